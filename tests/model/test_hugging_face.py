"""Our model computes what transformers' LlamaForCausalLM computes with the same weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megallama.config.schema import ModelConfig, RopeScaling
from megallama.model.llama import Llama
from tests.model.small import plan_of, small_config, small_model

LLAMA_3_1 = RopeScaling(factor=8.0)
ROWS, LENGTH = 2, 512

cases = pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"rope_scaling": LLAMA_3_1}, id="llama-3.1"),
        pytest.param({"rope_scaling": RopeScaling(factor=32.0), "tie_embeddings": True}, id="3.2"),
        pytest.param({}, id="no-scaling"),
        pytest.param({"kv_heads": 1, "rope_scaling": LLAMA_3_1}, id="one-kv-head"),
        pytest.param({"kv_heads": 4}, id="no-gqa"),
        pytest.param({"tie_embeddings": True}, id="tied"),
        pytest.param({"vocab": 256, "layers": 3}, id="vocab-without-padding"),
        pytest.param({"head_dim": 16, "norm_eps": 1e-3}, id="heads-wider-than-hidden"),
        pytest.param({"rope_theta": 10_000.0}, id="theta-of-llama-2"),
    ],
)


def hugging_face(config: ModelConfig) -> Any:
    transformers = pytest.importorskip("transformers")
    scaling = config.rope_scaling
    rope = scaling and {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context,
    }
    theirs = transformers.LlamaConfig(
        hidden_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.ffn,
        vocab_size=config.vocab,
        rms_norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,
        rope_scaling=rope,
        max_position_embeddings=131_072,
        tie_word_embeddings=config.tie_embeddings,
    )
    return transformers.LlamaForCausalLM(theirs)


def in_their_words(ours: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our weights, or their gradients, under transformers' names."""
    theirs = {
        "model.embed_tokens.weight": ours["embed.weight"][: config.vocab],
        "model.norm.weight": ours["head.norm"],
    }
    if not config.tie_embeddings:
        theirs["lm_head.weight"] = ours["head.weight"][: config.vocab]
    for i in range(config.layers):
        block = {leaf: ours[f"layers.{i}.{leaf}"] for leaf in OUR_LEAVES}
        kv = block["wkv"].view(config.kv_heads, 2, config.head_dim, config.hidden)
        named = {
            "input_layernorm": block["attn_norm"],
            "self_attn.q_proj": block["wq"],
            "self_attn.k_proj": kv[:, 0].reshape(-1, config.hidden),
            "self_attn.v_proj": kv[:, 1].reshape(-1, config.hidden),
            "self_attn.o_proj": block["wo"],
            "post_attention_layernorm": block["ffn_norm"],
            "mlp.gate_proj": block["w13"][:, 0],
            "mlp.up_proj": block["w13"][:, 1],
            "mlp.down_proj": block["w2"],
        }
        theirs |= {f"model.layers.{i}.{name}.weight": w for name, w in named.items()}
    return theirs


OUR_LEAVES = ("attn_norm", "wq", "wkv", "wo", "ffn_norm", "w13", "w2")


def both_models(changes: dict[str, Any]) -> tuple[ModelConfig, Llama, Any]:
    config = small_config(**changes)
    ours, theirs = small_model(config, torch.float32), hugging_face(config)
    weights = in_their_words({n: p.detach() for n, p in ours.named_parameters()}, config)
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_embeddings else set())
    return config, ours, theirs


def random_tokens(config: ModelConfig, length: int) -> Tensor:
    return torch.randint(config.vocab, (ROWS, length), generator=torch.Generator().manual_seed(7))


@cases
def test_logits(changes: dict[str, Any]):
    config, ours, theirs = both_models(changes)
    tokens = random_tokens(config, LENGTH)
    with torch.no_grad():
        logits = ours(tokens.flatten(), plan_of(config, [LENGTH] * ROWS, torch.float32))
        expected = theirs(tokens).logits
    assert expected.std() > 0.3, "weights so small that any wiring would do"
    torch.testing.assert_close(logits.unflatten(0, (ROWS, -1)), expected, rtol=1e-5, atol=1e-5)


@cases
def test_gradients_of_the_mean_loss(changes: dict[str, Any]):
    config, ours, theirs = both_models(changes)
    tokens = random_tokens(config, 65)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].clone()
    labels[:, 10:20] = -100
    plan = plan_of(config, [64] * ROWS, torch.float32)
    loss = ours(inputs.flatten(), plan, labels.flatten(), 1 / (labels != -100).sum())
    loss.backward()
    expected_loss = torch.nn.functional.cross_entropy(
        theirs(inputs).logits.flatten(0, 1), labels.flatten()
    )
    expected_loss.backward()

    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    ours_by_name = {n: p.grad for n, p in ours.named_parameters()}
    expected = {n: p.grad for n, p in theirs.named_parameters()}
    found = in_their_words(ours_by_name, config)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        off = (found[name] - grad).norm() / grad.norm()
        assert off < 1e-5, f"{name}: {off:.1e}"
    for name in ("embed.weight", "head.weight"):
        if name in ours_by_name:
            assert ours_by_name[name][config.vocab :].eq(0).all(), "padded rows must not learn"
