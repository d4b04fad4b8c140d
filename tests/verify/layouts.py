"""The layouts that must give the numbers of one process.

`python -m tests.verify.layouts [NAME ...]` runs them, or all, in every dtype; its output is in
docs/verify.md.
"""

from __future__ import annotations

import sys
from typing import Any

from megallama.config.schema import Config
from megallama.verify.run import verify

STEPS = 20
DTYPES = ("float64", "float32", "bf16")

MODEL = {
    "hidden": 128,
    "layers": 4,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 16,
    "ffn": 256,
    "vocab": 512,
}

WITHOUT_DOCUMENTS = {"data": {"document_mask": False}}

LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "TP2": {"layout": {"tensor": 2}},
    "TP4": {"layout": {"tensor": 4}},
    "PP2": {"layout": {"pipeline": 2}},
    "PP2 gpipe": {"layout": {"pipeline": 2, "schedule": "gpipe"}},
    "PP4": {"layout": {"pipeline": 4}},
    "FSDP2": {"layout": {"data_shard": 2}},
    "FSDP4": {"layout": {"data_shard": 4}},
    "HSDP 2x2": {"layout": {"data_shard": 2, "data_replicate": 2}},
    "replicas 2": {"layout": {"data_replicate": 2}},
    "TP2 PP2": {"layout": {"tensor": 2, "pipeline": 2}},
    "TP2 FSDP2": {"layout": {"tensor": 2, "data_shard": 2}},
    "TP2 replicas 2": {"layout": {"tensor": 2, "data_replicate": 2}},
    "PP2 FSDP2": {"layout": {"pipeline": 2, "data_shard": 2}},
    "PP2 FSDP2 resharding": {
        "layout": {"pipeline": 2, "data_shard": 2, "reshard_after_forward": True}
    },
    "PP2 replicas 2": {"layout": {"pipeline": 2, "data_replicate": 2}},
    "FSDP2 without resharding": {"layout": {"data_shard": 2, "reshard_after_forward": False}},
    "TP2 PP2 FSDP2": {"layout": {"tensor": 2, "pipeline": 2, "data_shard": 2}},
    "TP2 PP2 HSDP 2x2": {
        "layout": {"tensor": 2, "pipeline": 2, "data_shard": 2, "data_replicate": 2}
    },
    "kv_heads 2, TP4": {"layout": {"tensor": 4}, "model": {"kv_heads": 2}},
    "kv_heads 2, TP4 FSDP2": {
        "layout": {"tensor": 4, "data_shard": 2},
        "model": {"kv_heads": 2},
    },
    "uneven vocabulary, TP2": {"layout": {"tensor": 2}, "model": {"vocab": 500}},
    "uneven vocabulary, TP4 PP2": {
        "layout": {"tensor": 4, "pipeline": 2},
        "model": {"vocab": 500},
    },
    "tied, TP2 FSDP2": {
        "layout": {"tensor": 2, "data_shard": 2},
        "model": {"tie_embeddings": True},
    },
    "uneven layers, PP4": {"layout": {"pipeline": 4}, "model": {"layers": 5}},
    "uneven shards, FSDP3": {"layout": {"data_shard": 3}, "train": {"global_batch_tokens": 9216}},
    "RoPE scaling, TP2": {
        "layout": {"tensor": 2},
        "model": {"rope_scaling": {"factor": 8.0}},
    },
    "full recomputation, TP2 PP2 FSDP2": {
        "layout": {"tensor": 2, "pipeline": 2, "data_shard": 2},
        "train": {"activation_checkpointing": "full"},
    },
    "selective recomputation, TP2 PP2 FSDP2": {
        "layout": {"tensor": 2, "pipeline": 2, "data_shard": 2},
        "train": {"activation_checkpointing": "selective"},
    },
    "without document mask, TP2": {
        "layout": {"tensor": 2, "micro_batch": 2},
        "data": {"document_mask": False},
    },
    "CP2": {"layout": {"context": 2}},
    "CP4": {"layout": {"context": 4}},
    "CP2 ring": {"layout": {"context": 2, "context_method": "ring"}},
    "CP4 ring": {"layout": {"context": 4, "context_method": "ring"}},
    "CP2 Ulysses": {"layout": {"context": 2, "context_method": "ulysses"}},
    "CP4 Ulysses": {"layout": {"context": 4, "context_method": "ulysses"}},
    "CP2, no documents": {"layout": {"context": 2}, **WITHOUT_DOCUMENTS},
    "CP4, no documents": {"layout": {"context": 4}, **WITHOUT_DOCUMENTS},
    "CP2 ring, no documents": {
        "layout": {"context": 2, "context_method": "ring"},
        **WITHOUT_DOCUMENTS,
    },
    "CP4 ring, no documents": {
        "layout": {"context": 4, "context_method": "ring"},
        **WITHOUT_DOCUMENTS,
    },
    "CP2 Ulysses, no documents": {
        "layout": {"context": 2, "context_method": "ulysses"},
        **WITHOUT_DOCUMENTS,
    },
    "CP4 Ulysses, no documents": {
        "layout": {"context": 4, "context_method": "ulysses"},
        **WITHOUT_DOCUMENTS,
    },
    "CP2 per document": {"layout": {"context": 2, "context_balance": "per_document"}},
    "CP4 ring per document": {
        "layout": {"context": 4, "context_method": "ring", "context_balance": "per_document"}
    },
    "kv_heads 2, CP4 Ulysses": {
        "layout": {"context": 4, "context_method": "ulysses"},
        "model": {"kv_heads": 2},
    },
    "TP2 CP2": {"layout": {"tensor": 2, "context": 2}},
    "TP2 CP2 ring": {"layout": {"tensor": 2, "context": 2, "context_method": "ring"}},
    "TP2 CP2 Ulysses": {"layout": {"tensor": 2, "context": 2, "context_method": "ulysses"}},
    "kv_heads 2, TP4 CP2": {"layout": {"tensor": 4, "context": 2}, "model": {"kv_heads": 2}},
    "full recomputation, TP2 CP2": {
        "layout": {"tensor": 2, "context": 2},
        "train": {"activation_checkpointing": "full"},
    },
    "selective recomputation, CP2 ring": {
        "layout": {"context": 2, "context_method": "ring"},
        "train": {"activation_checkpointing": "selective"},
    },
    "elementwise recomputation, TP2 CP2": {
        "layout": {"tensor": 2, "context": 2},
        "train": {"activation_checkpointing": "elementwise"},
    },
    "elementwise recomputation, PP2 FSDP2 resharding": {
        "layout": {"pipeline": 2, "data_shard": 2, "reshard_after_forward": True},
        "train": {"activation_checkpointing": "elementwise"},
    },
    "CP2 PP2": {"layout": {"context": 2, "pipeline": 2}},
    "CP2 FSDP2": {"layout": {"context": 2, "data_shard": 2}},
    "CP2 replicas 2": {"layout": {"context": 2, "data_replicate": 2}},
    "CP2 HSDP 2x2": {"layout": {"context": 2, "data_shard": 2, "data_replicate": 2}},
    "TP2 CP2 PP2": {"layout": {"tensor": 2, "context": 2, "pipeline": 2}},
    "TP2 CP2 FSDP2": {"layout": {"tensor": 2, "context": 2, "data_shard": 2}},
    "CP2 PP2 FSDP2": {"layout": {"context": 2, "pipeline": 2, "data_shard": 2}},
    "TP2 CP2 PP2 FSDP2": {"layout": {"tensor": 2, "context": 2, "pipeline": 2, "data_shard": 2}},
    "interleaved V=2, PP2": {
        "layout": {"pipeline": 2, "schedule": "interleaved_1f1b", "virtual_stages": 2}
    },
    "interleaved V=3, PP2": {
        "layout": {"pipeline": 2, "schedule": "interleaved_1f1b", "virtual_stages": 3},
        "model": {"layers": 6},
    },
    "interleaved V=2, PP4": {
        "layout": {"pipeline": 4, "schedule": "interleaved_1f1b", "virtual_stages": 2},
        "model": {"layers": 8},
    },
    "interleaved V=2, TP2 CP2 PP2 FSDP2": {
        "layout": {
            "tensor": 2,
            "context": 2,
            "pipeline": 2,
            "data_shard": 2,
            "schedule": "interleaved_1f1b",
            "virtual_stages": 2,
        }
    },
    "interleaved V=2, PP2 FSDP2 resharding": {
        "layout": {
            "pipeline": 2,
            "data_shard": 2,
            "schedule": "interleaved_1f1b",
            "virtual_stages": 2,
            "reshard_after_forward": True,
        }
    },
    "PP4, 2 micro-batches": {
        "layout": {"pipeline": 4, "micro_batch": 6},
        "data": {"seq_len": 1024},
    },
    "given stages, PP4": {
        "layout": {"pipeline": 4, "stage_layers": [1, 2, 2, 1]},
        "model": {"layers": 6},
    },
    "tied, PP2": {"layout": {"pipeline": 2}, "model": {"tie_embeddings": True}},
    "tied, TP2 PP2 FSDP2": {
        "layout": {"tensor": 2, "pipeline": 2, "data_shard": 2},
        "model": {"tie_embeddings": True},
    },
    "tied, interleaved V=2, PP2": {
        "layout": {"pipeline": 2, "schedule": "interleaved_1f1b", "virtual_stages": 2},
        "model": {"tie_embeddings": True},
    },
    **{
        f"interleaved V=2, PP2, N={group}, {count} micro-batches": {
            "layout": {
                "pipeline": 2,
                "schedule": "interleaved_1f1b",
                "virtual_stages": 2,
                "micro_batch_group": group,
            },
            "train": {"global_batch_tokens": (56 + count) * 192},
        }
        for count in (8, 9)
        for group in (2, 4, 8)
    },
    "stages without layers, interleaved V=2, PP2": {
        "layout": {
            "pipeline": 2,
            "schedule": "interleaved_1f1b",
            "virtual_stages": 2,
            "stage_layers": [0, 2, 2, 0],
        }
    },
    "split masters, TP2 FSDP2": {
        "layout": {"tensor": 2, "data_shard": 2, "reshard_after_forward": False},
        "optimizer": {"lr": 1e-3, "master": "split"},
    },
    "split masters, tied, TP2 PP2": {
        "layout": {"tensor": 2, "pipeline": 2},
        "model": {"tie_embeddings": True},
        "optimizer": {"lr": 1e-3, "master": "split"},
    },
    "without clipping, FSDP2": {"layout": {"data_shard": 2}, "train": {"grad_clip": 0.0}},
}


def make_config(model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
    """A config with sections merged over a small default one."""
    layout = {"data_shard": 1} | sections.pop("layout", {})
    if layout["data_shard"] * layout.get("context", 1) > 1 and "pipeline" not in layout:
        layout.setdefault("reshard_after_forward", True)  # as models have it that are not tiny
    plain = {
        "model": MODEL | (model or {}),
        "layout": layout,
        "train": {"global_batch_tokens": 12288, "steps": STEPS} | sections.pop("train", {}),
        "optimizer": {"lr": 1e-3},
    }
    return Config.model_validate(plain | sections)


def main() -> int:
    print(
        "| layout | processes | float64: loss | grad norm | gradients | float32: loss (bar) |",
        end="",
    )
    print(" grad norm (bar) | bf16: loss (bar) | grad norm (bar) |")
    print("|---|---|---|---|---|---|---|---|---|")
    passed = True
    for name in sys.argv[1:] or LAYOUTS:
        sections = LAYOUTS[name]
        cells = []
        for dtype in DTYPES:
            report = verify(make_config(**sections), dtype=dtype, steps=STEPS, max_processes=16)
            passed &= report.passed
            found = {check.name: check for check in report.checks}
            if dtype == "float64":
                shown = [found[n] for n in ("loss", "grad norm", "gradients, step 1")]
                cells += [f"{check.error:.0e}" for check in shown]
            else:
                shown = [found[f"{n}, all steps"] for n in ("loss", "grad norm")]
                cells += [f"{check.error:.0e} ({check.bar:.0e})" for check in shown]
            cells[-1] += "" if report.passed else " **FAIL**"
        print(f"| {name} | {report.processes} | {' | '.join(cells)} |", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
