"""The oracle: the same answers as the engine, with plain transformers and nothing else.

Slow and simple on purpose. Every engine number is tested against it, and training uses it.

    reference = Reference(load_ensemble(folder))
    scores = reference.score(token_ids, response_start)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from drafts.divergence import measures
from drafts.manifest import Ensemble, ExitDraft, Member, ModelDraft, ResidualDraft
from drafts.residual import ResidualHead
from drafts.scores import TokenScores
from drafts.weights import read_member


class Reference:
    """A target and its drafts as transformers models on one device.

    Args:
        ensemble: what `load_ensemble` returned.
        dtype: of all weights and activations; measures are computed in float32 from the logits.
        target: the target, if it is loaded already.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        target: Any = None,
    ) -> None:
        from transformers import AutoModelForCausalLM

        self.ensemble = ensemble
        self.target = target or AutoModelForCausalLM.from_pretrained(
            ensemble.target_path,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
        self.target.to(device).eval()
        # Drafts of one residual student share its checkpoint.
        checkpoints = {member.path: member for member in ensemble.members}
        built = {
            path: _build(member).to(device, dtype).eval() for path, member in checkpoints.items()
        }
        self.modules = [built[member.path] for member in ensemble.members]
        head_Vd = self.target.get_output_embeddings().weight.detach()
        self.directions = {path: head_Vd @ built[path].basis for path in ensemble.students()}
        self.draws = {path: draws for path, (_, draws) in ensemble.students().items()}

    @torch.inference_mode()
    def states(self, token_ids: Sequence[int]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Final hidden states [T, d] of each draft, with the LM head [V, d] above them, and those
        of the target."""
        ids = torch.tensor([list(token_ids)], device=self.target.device)
        out = self.target.base_model(ids, output_hidden_states=True)
        # transformers: entry i is the state after i layers, except that the last one is normed.
        states, h_Td = out.hidden_states, out.last_hidden_state[0]
        head_Vd = self.target.get_output_embeddings().weight
        logits_TV = F.linear(h_Td, head_Vd) if self.draws else None
        drafts: list[tuple[Tensor, Tensor]] = []
        moved: dict[Path, dict[int, Tensor]] = {}  # by residual student and draw
        for member, module in zip(self.ensemble.members, self.modules, strict=True):
            draft = member.draft
            if isinstance(draft, ModelDraft):
                own = module.base_model(ids).last_hidden_state[0]
                drafts.append((own, module.get_output_embeddings().weight))
            elif isinstance(draft, ExitDraft):
                own = module.base_model(inputs_embeds=states[draft.layer]).last_hidden_state[0]
                drafts.append((own, head_Vd))
            else:
                if member.path not in moved:
                    taps = [states[layer][0] for layer in member.config.taps]
                    draws, directions_Vr = self.draws[member.path], self.directions[member.path]
                    found = module(h_Td, taps, logits_TV, directions_Vr, draws)
                    moved[member.path] = dict(zip(draws, found, strict=True))
                drafts.append((moved[member.path][draft.draw], head_Vd))
        return drafts, h_Td

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Next-token logits after each of T tokens: the drafts' [K, T, V], the target's [T, V]."""
        ids = torch.tensor([list(token_ids)], device=self.target.device)
        drafts, _ = self.states(token_ids)
        logits = []
        for member, module, (state_Td, head_Vd) in zip(
            self.ensemble.members, self.modules, drafts, strict=True
        ):
            # A model's own forward pass: some scale, cap or shift what their LM head gives.
            is_model = isinstance(member.draft, ModelDraft)
            logits.append(module(ids).logits[0] if is_model else F.linear(state_Td, head_Vd))
        return torch.stack(logits), self.target(ids).logits[0]

    def score(self, token_ids: Sequence[int], response_start: int) -> TokenScores:
        """Measures of the tokens from `response_start` on; see `Engine.score`."""
        drafts_KTV, target_TV = self.logits(token_ids)
        # Row i predicts token i + 1.
        rows = slice(response_start - 1, len(token_ids) - 1)
        logp_TV = torch.log_softmax(target_TV[rows].float(), -1)
        own = torch.tensor(list(token_ids[response_start:]), device=logp_TV.device).unsqueeze(-1)
        logprob_T1 = logp_TV.gather(-1, own)
        values = measures(drafts_KTV[:, rows], target_TV[rows])
        return TokenScores(
            logprob=logprob_T1.squeeze(-1).double().cpu().numpy(),
            rank=(logp_TV >= logprob_T1).sum(-1).cpu().numpy(),
            entropy=values.entropy.double().cpu().numpy(),
            total=values.total.double().cpu().numpy(),
            jsd=values.jsd.double().cpu().numpy(),
            kl=values.kl.double().cpu().numpy(),
            weights_version=self.ensemble.manifest.weights_version,
        )


def _build(member: Member) -> Any:
    weights = read_member(member)
    if isinstance(member.draft, ResidualDraft):
        head = ResidualHead(member.config)
        head.load_weights(weights.items())
        return head
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_config(member.config, trust_remote_code=False)
    # `read_member` has checked names and shapes; what is missing is shared or tied.
    module.load_state_dict(weights, strict=False)
    module.tie_weights()
    return module
