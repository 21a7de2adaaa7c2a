"""Every decoder of the installed transformers that can be made small: loaded, lowered and run, beside transformers.

    python benchmarks/decoder_zoo.py [--family NAME ...] [--engine genai|litert-lm] [--again] [--seconds 120] [--page]

Each family is a model of random weights whose sizes are cut to a few rows. A row says what came of it in each engine:
``passed`` (as many greedy tokens as were asked for are transformers' own, and the logits of a text lie within 40 dB),
``refused`` with the line that a user would read, or ``failed`` with what went wrong. Each runs in a process of its own
with a limit on its time. What is known already is kept in decoder-zoo.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from families import make_tokenizer
from results import RESULTS, write_page

CONTEXT, CHUNK, PROMPT, NEW = 64, 8, 20, 32
LEAST_DB = 40.0
KEPT = RESULTS / "decoder-zoo.json"
ENGINES = ("genai", "litert-lm")
# Said of every configuration that has such a setting.
SMALL: Mapping[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "n_positions": 128, "n_embd": 64,
    "n_layer": 4, "n_layers": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_layers": 4, "n_inner": 96, "n_ctx": 128,
    "ffn_dim": 96, "d_model": 64, "d_ff": 96, "attention_heads": 4, "decoder_layers": 4, "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96, "max_seq_len": 128, "seq_length": 128, "sliding_window": 12, "window_size": 12,
    "rotary_dim": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "dropout": 0.0, "embedding_size": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
    "moe_num_experts": 4, "moe_topk": 2, "moe_k": 2, "moe_top_k": 2, "shared_expert_intermediate_size": 48,
    "n_shared_experts": 1, "num_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "qk_head_dim": 24, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2, "mamba_n_groups": 1,
    "mamba_d_ssm": 128, "mamba_chunk_size": 8, "state_size": 8, "lru_width": 64, "attention_window_size": 12, "num_memory_blocks": 2,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 8, "global_head_dim": 24, "num_kv_shared_layers": 1,
    "laurel_rank": 8, "query_pre_attn_scalar": 24, "attention_chunk_size": 12, "intermediate_size_mlp": 96,
    "logits_scaling": 2.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "embedding_multiplier": 3.0,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8, "layer_types": None, "full_attention_interval": 2,
    "num_nextn_predict_layers": 0, "initializer_range": 0.1, "intermediate_size_per_layer": None,
}  # fmt: skip
# What a family wants otherwise. A value that is None is left to the configuration's own default.
OWN: Mapping[str, Mapping[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0], "intermediate_size": 96,
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma4_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    },
    "qwen3_5_text": {"layer_types": ["full_attention"] * 4},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "deepseek_v2": {"q_lora_rank": 24, "topk_method": "greedy", "num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4, "n_group": 2},
    "falcon": {"alibi": False, "multi_query": True, "new_decoder_architecture": False},
    "bloom": {"n_layer": 4, "n_head": 4},
}  # fmt: skip
# Other settings of a family that another of its models has.
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "falcon+alibi": ("falcon", {"alibi": True}),
    "falcon+new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "qwen3_5_text+linear": (
        "qwen3_5_text", {"layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]},
    ),
    "deepseek_v2+lite": ("deepseek_v2", {"q_lora_rank": None}),
    "gemma4_text+equal_kv": ("gemma4_text", {"attention_k_eq_v": True, "num_kv_shared_layers": 0}),
}  # fmt: skip
# Named in the goal of this work.
NAMED = (
    "vaultgemma", "gemma3n_text", "gemma4_text", "qwen3_5_text", "gpt_oss", "deepseek_v2", "deepseek_v3", "diffllama",
    "gptj", "gpt_neo", "codegen",
)  # fmt: skip
UNSET = object()


def families() -> list[str]:
    """Model types of decoders, the named ones first."""
    import transformers

    known = {cls.model_type for cls in transformers.MODEL_FOR_CAUSAL_LM_MAPPING}
    rest = sorted(known - set(NAMED))
    return [*NAMED, *VARIANTS, *rest]


def configuration(family: str) -> Any:
    """A small configuration, in which whatever is a size is small."""
    import transformers

    kind, extra = VARIANTS.get(family, (family, {}))
    cls = transformers.CONFIG_MAPPING[kind]
    default = cls()
    if getattr(default, "text_config", None) is not None and not isinstance(default.text_config, dict):
        raise NotImplementedError(f"holds a text model of its own kind, {default.text_config.model_type}")
    settings = {**default.to_dict(), **dict.fromkeys(cls.attribute_map)}
    mapped = set(cls.attribute_map)
    wanted = {
        key: value for key, value in SMALL.items() if (key in settings and key not in mapped) and value is not None
    }
    wanted = {
        key: value
        for key, value in wanted.items()
        if settings[key] is not None or key in ("q_lora_rank", "sliding_window", "num_experts_per_tok")
    }
    if "qk_rope_head_dim" in settings and "head_dim" in wanted:
        # Latent attention: what its rotations are made for.
        wanted["head_dim"] = SMALL["qk_rope_head_dim"]
    # Dead tokens of other sizes of vocabulary.
    for key, value in settings.items():
        if key.endswith("_token_id") and isinstance(value, int) and value >= 256:
            wanted[key] = 0
    own = {**OWN.get(kind, {}), **extra}
    return cls(**{**wanted, **own})


def make(family: str, folder: Path) -> Any:
    """Write the folder; the model."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = configuration(family)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > 40_000_000:
        raise NotImplementedError(f"{count / 1e6:.0f} million parameters even so")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.05 if "embed" in name or "shared" in name else 0.15)
            elif "A_log" not in name and "dt" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return model


def lower(engine: str, model: Any, folder: Path) -> Any:
    """The artifact of a loaded program, by the pass that makes that engine's."""
    from edgeship.core.passes import Context
    from edgeship.core.registry import passes, runtimes

    cls = next(cls for cls in passes().values() if cls.edges()[1] is runtimes()[engine].artifact)
    known = {field.name for field in dataclasses.fields(cls)}
    given: dict[str, Any] = {
        name: value for name, value in {"context": CONTEXT, "chunk": CHUNK}.items() if name in known
    }
    return cls(**given).run(model, ctx=Context(folder))


def wanted_of(model: Any) -> tuple[list[int], list[int], Any, Any]:
    """Prompt and greedy tokens of transformers' own, a text, and its logits."""
    import torch

    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(2, 256, (1, PROMPT), generator=generator)
    text = torch.randint(2, 256, (1, 28), generator=generator)
    with torch.no_grad():
        ids = prompt
        for _ in range(NEW):
            # Without a cache: caches of some models are wrong when they are small.
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        logits = model(input_ids=text, use_cache=False).logits
    return prompt[0].tolist(), ids[0, PROMPT:].tolist(), text, logits


def measure(family: str, engines: list[str]) -> dict[str, Any]:
    """What came of a family in each engine."""
    import numpy as np

    from edgeship.core.model import TorchModel
    from edgeship.core.registry import runtimes
    from edgeship.errors import EdgeshipError
    from edgeship.frontends.decoder import load_decoder
    from edgeship.llm.generation import generate

    with tempfile.TemporaryDirectory() as temporary:
        try:
            model = make(family, Path(temporary) / "model")
            prompt, wanted, text, logits = wanted_of(model)
        except Exception as error:
            return {engine: {"state": "not made", "line": line_of(error)} for engine in engines}
        del model
        try:
            program = load_decoder(Path(temporary) / "model", 32).program
            program.save(Path(temporary) / "program")
        except EdgeshipError as error:
            return {engine: {"state": "refused", "line": line_of(error)} for engine in engines}
        except Exception as error:
            return {
                engine: {"state": "failed", "line": f"load: {line_of(error)}", "trace": trace()} for engine in engines
            }
        from edgeship.program.program import REMARK

        notes = [entry.removeprefix(REMARK) for entry in program.record.history if entry.startswith(REMARK)]
        found: dict[str, Any] = {}
        for engine in engines:
            made = Path(temporary) / engine
            made.mkdir()
            given = TorchModel(Path(temporary) / "program", program.signature)
            try:
                artifact = lower(engine, given, made)
                with runtimes()[engine].open(artifact) as session:
                    if hasattr(session.stepper, "chunk") and "chunk" not in artifact.facts:
                        session.stepper.chunk = CHUNK
                    written = list(generate(session.stepper, prompt, NEW))
                    answer = session.run({"input_ids": text.numpy()})["logits"]
                reference = logits.double().numpy()
                noise = float(((answer - reference) ** 2).mean())
                snr = 10 * np.log10(float((reference**2).mean()) / max(noise, 1e-30))
                same = next((i for i, (a, b) in enumerate(zip(written, wanted, strict=True)) if a != b), NEW)
                passed = same == NEW and snr >= LEAST_DB
                found[engine] = {
                    "state": "passed" if passed else "failed",
                    "same": same,
                    "snr": round(snr, 1),
                    "notes": notes,
                }
                if not passed:
                    found[engine]["line"] = f"{same} of {NEW} tokens, {snr:.1f} dB"
            except EdgeshipError as error:
                found[engine] = {"state": "refused", "line": line_of(error)}
            except Exception as error:
                found[engine] = {"state": "failed", "line": line_of(error), "trace": trace()}
        return found


def line_of(error: Exception) -> str:
    kind = "" if type(error).__module__.startswith("edgeship") else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())[:240]}"


def trace() -> list[str]:
    return traceback.format_exc().strip().splitlines()[-14:]


def in_child(family: str, engines: list[str], seconds: int) -> dict[str, Any]:
    """`measure` in a process of its own, which shares what is imported."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        signal.alarm(seconds)
        quiet = os.open(os.devnull, os.O_WRONLY)
        if not os.environ.get("ZOO_LOUD"):
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
        try:
            answer = measure(family, engines)
        except BaseException as error:
            answer = {engine: {"state": "failed", "line": f"{type(error).__name__}: {error}"} for engine in engines}
        with os.fdopen(write, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    with contextlib.suppress(ValueError):
        return json.loads(text)
    why = (
        f"longer than {seconds} s"
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
        else f"died of {status}"
    )
    return {engine: {"state": "failed", "line": why} for engine in engines}


def cell(known: Mapping[str, Any] | None) -> str:
    if known is None:
        return "not run"
    line = str(known.get("line", "")).replace("|", "\\|")
    return f"passed, {known['snr']:.0f} dB" if known["state"] == "passed" else f"**{known['state']}**: {line}"


def page(known: Mapping[str, Any]) -> None:
    rows, counts = [], {}
    for family in families():
        both = known.get(family)
        if both is None:
            continue
        for engine in ENGINES:
            state = both.get(engine, {}).get("state", "not run")
            counts[engine, state] = counts.get((engine, state), 0) + 1
        if all(entry["state"] == "not made" for entry in both.values()):
            continue
        notes = "; ".join(dict.fromkeys(note for entry in both.values() for note in entry.get("notes", ()))) or "-"
        rows.append([family, *(cell(both.get(engine)) for engine in ENGINES), notes])
    said = ". ".join(
        f"{engine}: " + ", ".join(f"{count} {state}" for (of, state), count in sorted(counts.items()) if of == engine)
        for engine in ENGINES
    )
    apart = [
        f"{family} ({both[ENGINES[0]]['line']})"
        for family, both in known.items()
        if both[ENGINES[0]]["state"] == "not made"
    ]
    waiting = [family for family in families() if family not in known]
    after = [f"Not made small, and so not tried: {'; '.join(apart)}."] if apart else []
    after += [f"Not run yet: {', '.join(waiting)}."] if waiting else []
    write_page(
        "decoder-zoo",
        "Decoders of transformers that nobody here chose",
        "python benchmarks/decoder_zoo.py",
        ("edgeship", "torch", "transformers", "onnxruntime-genai", "ai-edge-litert"),
        ("family", *ENGINES, "notes of the build"),
        rows,
        before=f"Random weights, cut to a few rows a matrix; float. *passed*: {NEW} greedy tokens after a prompt of {PROMPT} "
        f"are transformers' own (eager attention, no cache), and logits of a text of 28 tokens, through the engine's cache, lie "
        f"within {LEAST_DB:.0f} dB of them. *refused*: the line that a user reads. *failed*: neither.\n\n{said}.",
        after="\n\n".join(after),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", action="append")
    parser.add_argument("--engine", choices=ENGINES, action="append")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--failed", action="store_true", help="again, those that did not pass")
    parser.add_argument("--seconds", type=int, default=120, help="for one family")
    parser.add_argument("--page", action="store_true", help="write the page of what is known, run nothing")
    given = parser.parse_args()
    known: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    if not given.page:
        # Before any process is forked.
        import torch
        import transformers  # noqa: F401

        import edgeship.frontends.decoder
        import edgeship.lowering.litert.decoder
        import edgeship.lowering.onnx.decoder  # noqa: F401

        torch.set_num_threads(1)
        for family in given.family or families():
            engines = list(given.engine or ENGINES)
            old = known.get(family, {})
            if not given.again:
                engines = [
                    e for e in engines if e not in old or (given.failed and old[e]["state"] in ("failed", "refused"))
                ]
            if not engines:
                continue
            start = time.perf_counter()
            known[family] = {**old, **in_child(family, engines, given.seconds)}
            for engine in engines:
                entry = known[family][engine]
                print(f"{time.perf_counter() - start:5.1f} s  {family:24s} {engine:10s} {entry['state']:9s} "
                      f"{entry.get('line', '')}{entry.get('snr', '')}", flush=True)  # fmt: skip
                if given.family:
                    print("\n".join(entry.get("trace", [])))
            KEPT.write_text(json.dumps(known, indent=1) + "\n")
    page(known)


if __name__ == "__main__":
    sys.exit(main())
