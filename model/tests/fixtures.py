"""Makes the fixtures of the tests: small random Llamas written by transformers, and their logits.

    pip install torch==2.9.0 transformers==4.57.3 && python model/tests/fixtures.py
"""

import json
import pathlib
import shutil

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

OUT = pathlib.Path(__file__).parent / "fixtures"
SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}

for name, scaling in SCALINGS.items():
    torch.manual_seed(len(name))
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        rms_norm_eps=1e-5,
        rope_theta=500.0,
        rope_scaling=scaling,
        tie_word_embeddings=name == "linear",
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            if "norm" in parameter:
                value.uniform_(0.5, 1.5)
    ids = torch.randint(0, 64, (1, 80))
    with torch.no_grad():
        logits = model(ids).logits[0]
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    # Two of them are in several files with an index.
    model.save_pretrained(folder, max_shard_size="20KB" if name in ("yarn", "linear") else "5GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file({"ids": ids[0].to(torch.float32), "logits": logits[-16:].contiguous()}, folder / "expected.safetensors")
    print(name, json.dumps(scaling), "largest logit", logits.abs().max().item())
