"""The weight posterior: exact restoration, seeds, the law of its noise, TokUR's own protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, Qwen2Config

from osd.posterior import PosteriorConfig, WeightPosterior, tokur_states

IDS = [5, 9, 2, 40, 33, 7, 21, 8]


def small_model(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    make = LlamaConfig if architecture == "llama" else Qwen2Config
    config = make(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def states(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.base_model(torch.tensor([IDS])).last_hidden_state[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    model = small_model(dtype=dtype)
    posterior = WeightPosterior(model, PosteriorConfig())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with posterior.sampled(3):
        changed = {
            name
            for name, tensor in model.state_dict().items()
            if not torch.equal(tensor, before[name])
        }
    with pytest.raises(KeyError), posterior.sampled(4):
        raise KeyError("in the middle")
    assert changed == {
        f"model.layers.{layer}.self_attn.{name}.weight"
        for layer in range(3)
        for name in ("q_proj", "v_proj")
    }
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_seeds_name_draws_and_draws_do_not_nest() -> None:
    model = small_model()
    posterior = WeightPosterior(model, PosteriorConfig())
    clean = states(model)
    drawn = []
    for seed in (1, 2, 1):
        with posterior.sampled(seed):
            drawn.append(states(model))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.allclose(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], clean)
    with (
        posterior.sampled(1),
        pytest.raises(RuntimeError, match="already"),
        posterior.sampled(2),
    ):
        pass
    assert torch.equal(states(model), clean)


def test_a_draw_moves_weights_within_the_first_singular_directions() -> None:
    model = small_model()
    config = PosteriorConfig(rank=4, sigma=0.3, modules=("o_proj",))
    posterior = WeightPosterior(model, config)
    layer = model.model.layers[1].self_attn.o_proj
    clean = layer.weight.detach().clone()
    u = torch.linalg.svd(clean).U[:, :4]
    coefficients = []
    for seed in range(200):
        with posterior.sampled(seed):
            move = layer.weight.detach() - clean
        inside = u.T @ move
        assert torch.allclose(u @ inside, move, atol=1e-5)
        coefficients.append(inside)
    values = torch.stack(coefficients)
    assert abs(float(values.std()) - 0.3) < 0.01
    assert abs(float(values.mean())) < 0.01


def test_token_noise_has_the_law_of_a_weight_draw() -> None:
    """For one token: the same covariance of a layer's output."""
    model = small_model()
    posterior = WeightPosterior(model, PosteriorConfig(rank=2, sigma=0.5, modules=("v_proj",)))
    layer = model.model.layers[0].self_attn.v_proj
    x = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(1))
    clean = layer(x)
    by_weights, by_tokens = [], []
    with torch.no_grad():
        for seed in range(3000):
            with posterior.sampled(seed):
                by_weights.append((layer(x) - clean).flatten())
        with posterior.token_noise(7):
            noisy = layer(x.expand(1, 3000, 32))
        by_tokens = list((noisy - clean)[0])
    a, b = (torch.cov(torch.stack(rows).T) for rows in (by_weights, by_tokens))
    assert float((a - b).norm() / a.norm()) < 0.15
    assert torch.equal(layer(x), clean)  # the hook is gone


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_tokur_is_decoding_with_a_clean_cache(architecture: str) -> None:
    """All tokens at once give what decoding one token after the other gives, noise for noise."""
    model = small_model(architecture)
    posterior = WeightPosterior(model, PosteriorConfig(sigma=0.5))
    got = tokur_states(model, posterior, IDS, samples=3, seed=11)
    assert torch.allclose(got[0], states(model), atol=1e-5)
    for sample in (1, 2):
        assert torch.allclose(got[sample], _decoded(model, posterior, 11 + sample), atol=1e-4)
        assert not torch.allclose(got[sample], got[0], atol=1e-2)


def test_tokur_of_an_answer_alone_is_that_of_its_place_in_the_text() -> None:
    """From a token on: the unperturbed rows are those of the whole, and so is the noise's law."""
    model = small_model()
    posterior = WeightPosterior(model, PosteriorConfig(sigma=0.5))
    whole = tokur_states(model, posterior, IDS, samples=400, seed=11)
    part = tokur_states(model, posterior, IDS, samples=400, seed=5000, first=3)
    assert part.shape == (400, len(IDS) - 3, 32)
    assert torch.allclose(part[0], whole[0, 3:], atol=1e-5)
    spread = [rows[1:].std(0).mean(-1) for rows in (whole[:, 3:], part)]
    assert torch.allclose(*spread, rtol=0.1)


def _decoded(model: Any, posterior: WeightPosterior, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # The noise of every layer and token, in the order in which one pass over the text draws it.
    noise = {name: torch.randn(1, len(IDS), 8, generator=generator) for name in posterior.layers}
    rows = []
    for t in range(len(IDS)):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            if t:
                model.base_model(torch.tensor([IDS[:t]]), past_key_values=cache, use_cache=True)

            def hook_of(name: str, t: int = t) -> Any:
                def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
                    norm = inputs[0].norm(dim=-1, keepdim=True)
                    xi = noise[name][:, t : t + 1]
                    return output + 0.5 * norm * xi @ posterior.bases[name].T

                return hook

            handles = [
                layer.register_forward_hook(hook_of(name))
                for name, layer in posterior.layers.items()
            ]
            out = model.base_model(torch.tensor([[IDS[t]]]), past_key_values=cache, use_cache=True)
            for handle in handles:
                handle.remove()
        rows.append(out.last_hidden_state[0, 0])
    return torch.stack(rows)


def test_singular_vectors_are_kept_and_a_broken_file_is_made_again(tmp_path: Path) -> None:
    model = small_model()
    first = WeightPosterior(model, PosteriorConfig(), cache=tmp_path)
    (file,) = tmp_path.glob("svd-*.safetensors")
    stamp = file.stat().st_mtime_ns
    again = WeightPosterior(model, PosteriorConfig(), cache=tmp_path)
    assert file.stat().st_mtime_ns == stamp
    for name, basis in first.bases.items():
        assert torch.equal(basis, again.bases[name])
    file.write_bytes(file.read_bytes()[:-10])
    assert (
        WeightPosterior(model, PosteriorConfig(), cache=tmp_path).bases.keys() == first.bases.keys()
    )
    assert file.stat().st_mtime_ns != stamp
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(2)
    WeightPosterior(model, PosteriorConfig(), cache=tmp_path)
    assert len(list(tmp_path.glob("svd-*.safetensors"))) == 2  # other weights, another file


def test_what_cannot_vary_is_refused() -> None:
    with pytest.raises(ValueError, match="no linear layers named w_proj"):
        WeightPosterior(small_model(), PosteriorConfig(modules=("w_proj",)))
    with pytest.raises(ValueError, match="too small for rank 20"):
        WeightPosterior(small_model(), PosteriorConfig(rank=20))
