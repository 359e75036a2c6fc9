"""What rivals of the drafts say of answers, from the target itself by plain transformers.

They need the whole distribution, the logits or several passes, which no service gives away. For
each token of an answer, in nats:

    tokur_{tu,au,eu}_M  TokUR's total, aleatoric, epistemic uncertainty of its first M samples, by
                        its own protocol (arXiv 2505.11737; `osd.posterior.tokur_states`)
    self_certainty      KL(U || p), U uniform over the vocabulary; high = certain (2502.18581)
    top_logprob_mean    mean log p of the 20 likeliest tokens; DeepConf's confidence is minus that,
                        high = certain (2508.15260)
    logtoku_{au,eu}     of the Dirichlet whose evidence is the 10 greatest logits (2502.00290):
                        AU = -sum_k (a_k/a_0)(psi(a_k + 1) - psi(a_0 + 1)), EU = 10 / (a_0 + 10)

Lines of `answers.jsonl`, which `demur eval` writes, go in; lines of `rivals.jsonl` come out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from drafts.divergence import measures
from drafts.init import default_folder
from drafts.text import EncodedText, TextEncoder, TextError
from osd.errors import OsdError
from osd.posterior import PosteriorConfig, WeightPosterior, tokur_states
from osd.schedule import derived_seed
from osd.teacher import Teacher

RIVALS = "rivals.jsonl"
SAMPLES = (2, 5, 10)

_TOP = 20
_EVIDENCE = 10
_LOGITS = 256  # rows of the vocabulary that are held at once
_TINY = 1e-38

Answer = dict[str, Any]
Columns = dict[str, list[float]]


def load_target(path: Path) -> Teacher:
    """The target in bfloat16, with TokUR's posterior at its published setting.

    Raises:
        OsdError: if it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.bfloat16,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
        posterior = WeightPosterior(model, PosteriorConfig(), cache=default_folder().parent / "svd")
    except (OSError, ValueError) as error:
        raise OsdError(f"the target in {path} cannot be loaded ({error})") from error
    return Teacher(model, posterior)


def check_run(folder: Path, model: str) -> None:
    """`OsdError` if the folder holds no run, or one of another target."""
    try:
        asked = json.loads((folder / "run.json").read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError) as error:
        raise OsdError(f"{folder} holds no run ({error}); `demur eval` makes one") from error
    if asked != model:
        raise OsdError(f"{folder} is of {asked}, and this is {model}; name its --ensemble")


def measure_run(
    folder: Path,
    teacher: Teacher,
    encoder: TextEncoder,
    *,
    model: str,
    with_tokur: int | None,
    seed: int,
    limit: int | None = None,
) -> int:
    """Measure the answers of a run that are not measured yet, and return how many those were.

    An answer that cannot be cut into tokens as the service would has no line.

    Args:
        model: the target's name, as the service that was asked gives it.
        with_tokur: so many answers get TokUR's passes, as near as can be half of them right and
            half wrong; None is all. Which they are depends on their ids alone.
        limit: so many answers are measured at all, drawn likewise.

    Raises:
        OsdError: if the folder holds no run, or one of another target.
    """
    check_run(folder, model)
    answers = _balanced(_read(folder / "answers.jsonl"), limit)
    costly = {answer["id"] for answer in _balanced(answers, with_tokur)}
    file = folder / RIVALS
    done = _done(file, {answer["id"]: answer["response"] for answer in answers})
    waiting = [answer for answer in answers if (answer["id"], answer["id"] in costly) not in done]
    added = 0
    with file.open("a", encoding="utf-8") as out:
        for answer in tqdm(waiting, desc=f"rivals of {folder.name}", unit="answer"):
            try:
                text = _encode(encoder, answer)
            except TextError as error:
                tqdm.write(f"{answer['id']} is left out: {error}")
                continue
            samples = max(SAMPLES) if answer["id"] in costly else 1
            columns = measure(teacher, text, samples, derived_seed(seed, answer["id"]))
            pieces = [answer["response"][token.start : token.end] for token in text.tokens]
            short = {
                name: [round(value, 5) for value in values] for name, values in columns.items()
            }
            line = {"id": answer["id"], "tokur": samples > 1, "text": pieces, "columns": short}
            out.write(json.dumps(line) + "\n")
            out.flush()
            added += 1
    return added


@torch.inference_mode()
def measure(teacher: Teacher, text: EncodedText, samples: int, seed: int) -> Columns:
    """The columns of one answer, each of its tokens' number; TokUR's where `samples` is over 1."""
    first = text.response_start - 1
    ids = text.token_ids[:-1]  # nothing is predicted after the last
    states_MTd = tokur_states(
        teacher.model, teacher.posterior, ids, samples, seed, first=first
    ).float()
    parts: dict[str, list[Tensor]] = {}
    for block in torch.split(states_MTd, max(1, _LOGITS // samples), dim=1):
        logits_MTV = teacher.logits(block.flatten(0, 1)).view(*block.shape[:2], -1)
        found = _single_pass(logits_MTV[0])
        for count in SAMPLES if samples > 1 else ():
            mixed = measures(logits_MTV[:count], logits_MTV[0])
            found[f"tokur_tu_{count}"] = mixed.total
            found[f"tokur_au_{count}"] = mixed.total - mixed.jsd
            found[f"tokur_eu_{count}"] = mixed.jsd
        for name, values in found.items():
            parts.setdefault(name, []).append(values)
    return {name: torch.cat(values).tolist() for name, values in parts.items()}


def _single_pass(logits_TV: Tensor) -> dict[str, Tensor]:
    logp_TV = torch.log_softmax(logits_TV, -1)
    n_vocab = logits_TV.shape[-1]
    evidence_TK = logits_TV.topk(min(_EVIDENCE, n_vocab)).values.clamp_min(0)
    a_0_T1 = evidence_TK.sum(-1, keepdim=True)
    shares_TK = evidence_TK / a_0_T1.clamp_min(_TINY)
    spread_TK = torch.digamma(evidence_TK + 1) - torch.digamma(a_0_T1 + 1)
    return {
        "self_certainty": -logp_TV.mean(-1) - torch.tensor(float(n_vocab)).log(),
        "top_logprob_mean": logp_TV.topk(min(_TOP, n_vocab)).values.mean(-1),
        "logtoku_au": -(shares_TK * spread_TK).sum(-1),
        "logtoku_eu": _EVIDENCE / (a_0_T1.squeeze(-1) + _EVIDENCE),
    }


def _encode(encoder: TextEncoder, answer: Answer) -> EncodedText:
    """The answer's tokens as POST /v1/score has them."""
    prompt = encoder.render([{"role": "user", "content": answer["prompt"]}])
    return encoder.encode(prompt, answer["response"], rendered=True)


def _balanced(answers: Sequence[Answer], wanted: int | None) -> list[Answer]:
    """As many right as wrong, where there are so many; drawn by a hash of the ids."""
    if wanted is None or wanted >= len(answers):
        return list(answers)
    order = sorted(answers, key=lambda answer: hashlib.sha256(answer["id"].encode()).digest())
    right = [answer for answer in order if answer["correct"]]
    wrong = [answer for answer in order if not answer["correct"]]
    n_right = min(len(right), max(wanted // 2, wanted - len(wrong)))
    return right[:n_right] + wrong[: wanted - n_right]


def _read(file: Path) -> list[Answer]:
    """Answers that have tokens."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise OsdError(f"{file}: {error.strerror}; `demur eval` makes it") from error
    found = [json.loads(line) for line in lines if line]
    return [answer for answer in found if "tokens" in answer and answer["response"]]


def _done(file: Path, responses: dict[str, str]) -> set[tuple[str, bool]]:
    """Which answers have a line, and whether with TokUR; a torn last line is cut off."""
    if not file.exists():
        return set()
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        file.write_bytes(whole)
    lines = [json.loads(line) for line in whole.splitlines()]
    done = {
        (line["id"], line["tokur"])
        for line in lines
        if "".join(line["text"]) == responses.get(line["id"])
    }
    # What has TokUR needs no line without it.
    return done | {(id_, False) for id_, _ in done}
