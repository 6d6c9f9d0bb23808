"""Peak memory of scoring a tree with a large vocabulary, each pass in a process of its own. Linux only.

`python tests/memory.py --out data/results/memory.json`
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

MEASURE = r"""
import json, pathlib, re, sys, time
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from threadweaver_ref.scoring import check_model, collate, tree_logprobs
from threadweaver_ref.tree import SpanTree

way, backward, tokens, vocabulary = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3]), int(sys.argv[4])
def status(name): return 1024 * int(re.search(name + r":\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
torch.set_num_threads(1)
torch.manual_seed(0)
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                                     head_dim=32, intermediate_size=128, bos_token_id=None, eos_token_id=1, pad_token_id=0))
tree, threads = SpanTree(), 8
main = tree.add([7] * (tokens - threads * (tokens // 9)))
for i in range(threads): tree.add([11 + i] * (tokens // 9), [main], sampled=True)
packed = tree.pack()
check_model(model)
pathlib.Path("/proc/self/clear_refs").write_text("5")   # the peak begins anew: check_model had one of its own
start, began = status("VmRSS"), time.perf_counter()
options = {"chunk": tokens} if way == "whole" else {}
with torch.set_grad_enabled(backward): loss = -tree_logprobs(model, collate([packed]), **options).mean()
if backward: loss.backward()
gradient = sum(float(p.grad.norm()) for p in model.parameters()) if backward else None
print(json.dumps({"packed_tokens": len(packed), "sampled": int(packed.sampled.sum()), "peak_bytes": status("VmHWM") - start,
                  "seconds": time.perf_counter() - began, "loss": loss.item(), "gradient": gradient}))
"""


def measured(way, backward, tokens, vocabulary) -> dict:
    "One pass in a process of its own: what it had at the peak beyond the model, in bytes."
    done = subprocess.run([sys.executable, "-c", MEASURE, way, str(backward), str(tokens), str(vocabulary)], capture_output=True, text=True)
    settings = {"way": way, "backward": backward, "tokens": tokens}
    if done.returncode: return {**settings, "error": f"exit status {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"}
    return {**settings, **json.loads(done.stdout.splitlines()[-1])}


def main():
    from threadweaver_ref.evaluate import provenance, public_path
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--whole", type=int, default=2048, help="the longest tree whose logits are made whole: each 1,024 tokens take some GB")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    args = parser.parse_args()
    given = [" ".join([f"--{name}", *map(str, value if isinstance(value, list) else [value])])
             for name, value in vars(args).items() if name != "out" and value != parser.get_default(name)]
    command = " ".join(["python tests/memory.py --out", public_path(args.out), *given])
    about = {**provenance(command, public_path(args.out), 0), "vocabulary": args.vocabulary}
    rows = []
    for tokens in args.tokens:
        for way in ("whole", "chunks"):
            for backward in (False, True):
                if way == "whole" and tokens > args.whole: continue
                rows.append(measured(way, backward, tokens, args.vocabulary))
                print(rows[-1], flush=True)
                args.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__": main()
