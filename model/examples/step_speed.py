"""Measures the training step of step_speed.rs in PyTorch, with transformers' Llama and SDPA or a model written by hand.

    pip install torch==2.9.0 transformers==4.57.3
    python step_speed.py transformers|by-hand SEQUENCE_TOKENS f32|bf16 [--checkpointing] [--steps N] [--device cuda] [--config FILE]

Prints a line of JSON: the median step and the peak memory. On a CPU that is the process's memory less that without a model.
"""

import json
import sys
import time

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

name, length, dtype = sys.argv[1], int(sys.argv[2]), {"f32": torch.float32, "bf16": torch.bfloat16}[sys.argv[3]]
checkpointing = "--checkpointing" in sys.argv
option = lambda name, default: sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default
D, LAYERS, HEADS, KV, FF, VOCAB = 256, 4, 8, 4, 688, 2048
if file := option("--config", None):
    shape = json.load(open(file))
    D, LAYERS, HEADS, FF, VOCAB = (
        shape[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"))
    KV = shape.get("num_key_value_heads", HEADS)
HD = D // HEADS
device = option("--device", "cpu")
torch.manual_seed(0)
torch.set_default_device(device)


class Norm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(D))

    def forward(self, x):
        return F.rms_norm(x, (D,), self.weight, 1e-5)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        linear = lambda i, o: torch.nn.Linear(i, o, bias=False)
        self.q, self.k, self.v, self.o = linear(D, D), linear(D, KV * HD), linear(D, KV * HD), linear(D, D)
        self.gate, self.up, self.down = linear(D, FF), linear(D, FF), linear(FF, D)
        self.before, self.after = Norm(), Norm()

    def forward(self, x, cos, sin):
        b, s, _ = x.shape
        y = self.before(x)
        split = lambda t, h: t.view(b, s, h, HD).transpose(1, 2)
        rotate = lambda t: t * cos + torch.cat((-t[..., HD // 2 :], t[..., : HD // 2]), -1) * sin
        q, k, v = rotate(split(self.q(y), HEADS)), rotate(split(self.k(y), KV)), split(self.v(y), KV)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).reshape(b, s, D))
        y = self.after(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class ByHand(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, D)
        self.layers = torch.nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = Norm(), torch.nn.Linear(D, VOCAB, bias=False)
        angles = torch.outer(torch.arange(length).float(), 10000.0 ** (-torch.arange(0, HD, 2).float() / HD))
        angles = torch.cat((angles, angles), -1)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            if checkpointing:
                x = checkpoint(layer, x, self.cos, self.sin, use_reentrant=False)
            else:
                x = layer(x, self.cos, self.sin)
        return self.head(self.norm(x))


def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def step_of(model, logits):
    # Parameters are f32; bf16 copies come from autocast, as in mixed-precision training.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, foreach=True)
    ids = torch.tensor([[(i * i * 31 + i * 7) % VOCAB for i in range(length)]])

    def step():
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = logits(model, ids)
        loss = F.cross_entropy(out.float().view(-1, VOCAB), ids.view(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


config = LlamaConfig(
    vocab_size=VOCAB, hidden_size=D, intermediate_size=FF, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
    num_key_value_heads=KV, rms_norm_eps=1e-5, max_position_embeddings=length, attn_implementation="sdpa", use_cache=False,
)
steps = int(option("--steps", 5))


def transformers():
    model = LlamaForCausalLM(config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    return step_of(model, lambda m, i: m(i).logits)


def by_hand():
    return step_of(ByHand(), lambda m, i: m(i))


peak_memory = torch.cuda.max_memory_allocated if device == "cuda" else lambda: memory("VmHWM:") - before
before = memory("VmRSS:")
with open("/proc/self/clear_refs", "w") as clear:
    clear.write("5")
step = {"transformers": transformers, "by-hand": by_hand}[name]()
times = []
for _ in range(steps):
    started = time.time()
    step()
    times.append(time.time() - started)
# The first step warms up.
measured = sorted(times[1:] or times)
print(json.dumps({
    "model": name, "tokens": length, "checkpointing": checkpointing, "threads": torch.get_num_threads(),
    "seconds": round(measured[len(measured) // 2], 3), "megabytes": peak_memory() // 1_000_000,
}))
