"""Compares models, tokenizers and logs with the libraries of others: transformers, tokenizers, tensorboard.

    python3 tests/hf_parity.py OUT.jsonl [TEXT]

run in the project's root after `make train data/tokenize build/hf_logits` on a machine that has these libraries. Both
directions: a model that transformers builds and saves is read here, gives the same logits and the same 50 greedy
tokens, and is exported again; a model of ours is loaded there. TEXT (any text file) is what a small model is trained
on to answer a prompt through AutoModelForCausalLM.generate. One line of JSON per comparison; the exit status is 1 when
one failed.
"""
import functools
import json
import os
import random
import subprocess
import sys
import tempfile

import numpy as np
import safetensors.torch
import tokenizers
import torch
import transformers

TOLERANCE = 1e-5  # relative L2 of logits, fp32
NEW_TOKENS = 50
failures = 0
out = None
commit = None


def cpu():
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        return next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "unknown")


def record(test, passed, **figures):
    """Writes a line of the results and remembers a failure."""
    global failures
    failures += not passed
    line = {"test": test, "passed": bool(passed), **figures, "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__, "torch": torch.__version__, "cpu": cpu(), "commit": commit,
            "command": "python3 tests/hf_parity.py OUT.jsonl tinyshakespeare.txt"}
    out.write(json.dumps(line) + "\n")
    print("ok  " if passed else "FAIL", test, figures, flush=True)


def run(*command):
    """Output of a program; an error shows what it said."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def commit_of_program(work):
    """The commit that ./train says it was built from."""
    run("./train", "--steps", 1, "--eval-every", 0, "--out", work + "/commit")
    with open(work + "/commit/log.jsonl", encoding="utf-8") as log:
        header = json.loads(log.readline())
    return header["git_sha"] + ("-dirty" if header["git_dirty"] else "")


def export(source, target, *options):
    """Our program reads a model and writes it again."""
    run("./train", "--init-from", source, "--steps", 0, "--eval-every", 0, "--seq", 64, "--batch", 1, "--out",
        target + ".run", "--export-hf", target, *options)


def ours(folder, ids):
    """(T, V) logits and the greedy continuation by our program."""
    work = tempfile.mkdtemp()
    np.array(ids, dtype=np.int32).tofile(f"{work}/ids")
    run("build/hf_logits", folder, f"{work}/ids", f"{work}/out", NEW_TOKENS)
    data = np.fromfile(f"{work}/out", dtype=np.uint8)
    greedy = data[-4 * NEW_TOKENS:].view(np.int32).tolist()
    return data[:-4 * NEW_TOKENS].view(np.float32).reshape(len(ids), -1), greedy


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def theirs(model, ids):
    with torch.no_grad():
        batch = torch.tensor([ids])
        logits = model(batch).logits[0].numpy()
        text = model.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=NEW_TOKENS, do_sample=False,
                              eos_token_id=None, pad_token_id=0)
    return logits, text[0, len(ids):].tolist()


def distance(a, b):
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64)))


def same_tensors(a, b):
    a, b = (safetensors.torch.load_file(f"{folder}/model.safetensors") for folder in (a, b))
    return a.keys() == b.keys() and all(a[name].dtype == torch.float32 and torch.equal(a[name], b[name].float())
                                        for name in a)


def randomise(model, std):
    """Weights large enough for attention, routing and the head to be far from uniform; norms around 1."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value.copy_(1 + 0.2 * torch.randn_like(value))
            else:
                value.copy_(std * torch.randn_like(value))


def build(seed, kv=2, tie=False, qk_norm=True, top_k=2, renorm=True, head_dim=16, dtype=torch.float32, step=1,
          experts=6):
    """A small model of transformers; seeds differ in all weights."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=259, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=kv,
                 head_dim=head_dim, max_position_embeddings=128, tie_word_embeddings=tie, num_experts_per_tok=top_k,
                 rms_norm_eps=1e-6, bos_token_id=None, eos_token_id=None, pad_token_id=None,
                 rope_parameters={"rope_type": "default", "rope_theta": 50000.0})
    if experts == 0:
        del shape["num_experts_per_tok"]
        config = transformers.Qwen3Config(intermediate_size=40, **shape)
        model = transformers.Qwen3ForCausalLM(config)
    elif qk_norm:
        config = transformers.Qwen3MoeConfig(moe_intermediate_size=40, intermediate_size=40 * top_k,
                                             num_experts=experts, norm_topk_prob=renorm, decoder_sparse_step=step,
                                             mlp_only_layers=[], **shape)
        model = transformers.Qwen3MoeForCausalLM(config)
    else:
        config = transformers.MixtralConfig(intermediate_size=40, num_local_experts=experts, sliding_window=None,
                                            **shape)
        model = transformers.MixtralForCausalLM(config)
    randomise(model, 0.15)
    return model.to(dtype)


CASES = {
    "qwen3_moe": {},
    "qwen3_moe, one KV head": dict(kv=1),
    "qwen3_moe, as many KV heads as heads": dict(kv=4),
    "qwen3_moe, tied": dict(tie=True),
    "qwen3_moe, not renormalised": dict(renorm=False),
    "qwen3_moe, top-1": dict(top_k=1, renorm=False),
    "qwen3_moe, top-1, tied, one KV head": dict(top_k=1, renorm=False, tie=True, kv=1),
    "qwen3_moe, top-6 of 6": dict(top_k=6),
    "qwen3_moe, wide heads": dict(head_dim=24),
    "qwen3_moe, narrow heads, tied": dict(head_dim=8, tie=True),
    "qwen3_moe, every second layer": dict(step=2),
    "qwen3_moe, bfloat16 file": dict(dtype=torch.bfloat16),
    "qwen3_moe, float16 file": dict(dtype=torch.float16),
    "mixtral": dict(qk_norm=False),
    "mixtral, tied": dict(qk_norm=False, tie=True),
    "mixtral, one KV head, wide heads": dict(qk_norm=False, kv=1, head_dim=24),
    "qwen3 (dense)": dict(experts=0),
}


def check_models(work):
    for seed, (name, options) in enumerate(CASES.items()):
        there, back = f"{work}/there{seed}", f"{work}/back{seed}"
        build(seed, **options).save_pretrained(there, max_shard_size="100KB" if seed % 2 else "5GB")
        random.seed(seed)
        ids = [random.randrange(259) for _ in range(60)]
        logits, greedy = ours(there, ids)
        model = load(there)
        want, want_greedy = theirs(model, ids)
        error = distance(logits, want)
        record(f"import: {name}", error <= TOLERANCE and greedy == want_greedy, relative_l2=error,
               same_greedy=greedy == want_greedy, files=len([f for f in os.listdir(there) if f.endswith("tensors")]))
        if options.get("experts") == 0:
            continue  # dense models are read, not written
        export(there, back)
        model.save_pretrained(f"{there}.fp32")
        again, again_greedy = theirs(load(back), ids)
        error = distance(again, want)
        record(f"export: {name}", error <= TOLERANCE and again_greedy == want_greedy and
               same_tensors(back, f"{there}.fp32"), relative_l2=error, same_greedy=again_greedy == want_greedy,
               same_bits=same_tensors(back, f"{there}.fp32"))


def check_upcycling(work):
    dense, folder = f"{work}/dense", f"{work}/upcycled"
    build(77, experts=0).save_pretrained(dense)
    export(dense, folder, "--upcycle", "--experts", 5, "--top-k", 2)
    ids = [random.randrange(259) for _ in range(60)]
    want, want_greedy = theirs(load(dense), ids)
    got, greedy = theirs(load(folder), ids)
    error = distance(got, want)
    record("upcycling keeps what the dense model computes", error <= TOLERANCE and greedy == want_greedy,
           relative_l2=error, same_greedy=greedy == want_greedy)


def check_initial(work):
    """Our own initial weights, as --steps 0 leaves them, for the options of the command line."""
    for seed, options in enumerate(["", "--qk-norm 0", "--router top1", "--renorm 0 --tie 1 --kv-heads 2",
                                    "--moe-every 2 --head-dim 64"]):
        folder = f"{work}/initial{seed}"
        run("./train", "--steps", 0, "--eval-every", 0, "--out", folder + ".run", "--export-hf", folder,
            *options.split())
        ids = [random.randrange(256) for _ in range(70)]
        logits, greedy = ours(folder, ids)
        want, want_greedy = theirs(load(folder), ids)
        own, own_greedy = ours(folder + ".run", ids)
        error = distance(logits, want)
        record(f"initial weights: {options or 'defaults'}", error <= TOLERANCE and greedy == want_greedy and
               np.array_equal(own, logits) and own_greedy == greedy, relative_l2=error,
               same_greedy=greedy == want_greedy, run_and_export_same_bits=bool(np.array_equal(own, logits)))


def mixed_text(seed, length):
    """Text of many scripts, spaces and edge cases; valid UTF-8."""
    rng = random.Random(seed)
    ranges = [(0x20, 0x7f), (0x20, 0x7f), (0x61, 0x7b), (0x41, 0x5b), (0x30, 0x3a), (0x9, 0xe), (0xa0, 0x250),
              (0x300, 0x370), (0x370, 0x400), (0x400, 0x500), (0x590, 0x700), (0x900, 0xa00), (0xe00, 0xe80),
              (0x1100, 0x1200), (0x2000, 0x2070), (0x2150, 0x2190), (0x3040, 0x3100), (0x4e00, 0x9fa0),
              (0xac00, 0xd7a4), (0xff00, 0xffef), (0x1d400, 0x1d7ff), (0x1f300, 0x1f650), (0x20000, 0x20100)]
    pieces = ["'s", "'LL", "don't", "  ", "\n\n", "\r\n", " \n ", "\t\t", "<|endoftext|>", "e\u0301", "\u00e9",
              "\u212b", "\u180e", "\u0085", "\u2028", "\ufeff", "\u200d", "1234567", "the ", " and", "\x00",
              "\u1e9b\u0323"]
    text = []
    while len(text) < length:
        if rng.random() < 0.3:
            text.append(rng.choice(pieces))
        else:
            low, high = rng.choice(ranges)
            text.append("".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 8))))
    return "".join(text)


def encode_here(folder, tokenizer, text, name):
    """Ids by data/tokenize, read from the shard that it writes."""
    path = f"{folder}/{name}.txt"
    with open(path, "wb") as file:
        file.write(text.encode())
    run("data/tokenize", "encode", "--tokenizer", tokenizer, "--val-share", 0, "--out", f"{folder}/{name}", path)
    shard = np.fromfile(f"{folder}/{name}/{name}_train_000000.bin", dtype=np.uint8)
    wide = shard[:4].view(np.int32)[0] == 20240801
    return shard[1024:].view(np.uint32 if wide else np.uint16).tolist()


GPT4 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+")
QWEN2 = GPT4.replace("{1,3}", "")


def train_there(kind, text):
    """A tokenizer of the tokenizers library."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
    if kind == "gpt2":
        tokenizer.pre_tokenizer = level
    elif kind == "digits":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    else:
        pattern = GPT4 if kind == "gpt4" else QWEN2
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), level])
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def check_tokenizers(work, path):
    with open(path, encoding="utf-8") as file:
        english = file.read()[:300000]
    texts = {"mixed": mixed_text(1, 40000), "english": english, "mixed 2": mixed_text(2, 40000)}
    for pattern in ("gpt2", "qwen2"):
        mine = f"{work}/{pattern}.json"
        run("data/tokenize", "train", "--vocab", 1500, "--pattern", pattern, "--out", mine, path)
        library = tokenizers.Tokenizer.from_file(mine)
        for name, text in texts.items():
            want = library.encode(text, add_special_tokens=False).ids
            got = encode_here(work, mine, text, f"mine_{pattern}_{name.replace(' ', '_')}")
            record(f"tokenizer of ours, {pattern}: {name}", got == want and library.decode(
                got, skip_special_tokens=False) == text, tokens=len(want), vocab=library.get_vocab_size())
    for kind in ("gpt2", "gpt4", "qwen2", "digits"):
        library = train_there(kind, english + texts["mixed"])
        library.save(f"{work}/there_{kind}.json")
        for name, text in texts.items():
            want = library.encode(text, add_special_tokens=False).ids
            got = encode_here(work, f"{work}/there_{kind}.json", text, f"there_{kind}_{name.replace(' ', '_')}")
            first = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), None)
            record(f"tokenizer of the library, {kind}: {name}", got == want, tokens=len(want),
                   first_difference=first if got != want else None)


def check_text(work, path):
    """A model trained here on TEXT answers a prompt there with the same text, by bytes and by BPE."""
    bpe = f"{work}/text.json"
    run("data/tokenize", "train", "--vocab", 1024, "--out", bpe, path)
    for name, tokenizer in (("byte", "byte"), ("bpe", bpe)):
        folder, prompt = f"{work}/text_{name}", "KING HENRY:\nWhat say you"
        run("./train", "--data", path, "--tokenizer", tokenizer, "--steps", 400, "--batch", 8, "--lr", "4e-3",
            "--warmup", 50, "--eval-every", 0, "--eval-batches", 4, "--seq", 128, "--tie", 1, "--out", folder + ".run",
            "--sample", 80, "--temperature", 0, "--prompt", prompt, "--export-hf", folder)
        with open(folder + ".run/log.jsonl", encoding="utf-8") as log:
            lines = [json.loads(line) for line in log]
        sample = next(line["text"] for line in lines if line.get("event") == "sample")
        loss = [line["loss"] for line in lines if "loss" in line][-1]
        bpb = [line["val_bpb"] for line in lines if "val_bpb" in line][-1]
        auto = transformers.AutoTokenizer.from_pretrained(folder)
        ids = auto(prompt, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            text = load(folder).generate(**ids, max_new_tokens=80, do_sample=False)
        answer = auto.decode(text[0, ids["input_ids"].shape[1]:], skip_special_tokens=True,
                             clean_up_tokenization_spaces=False)
        with open(path, "rb") as file:
            data = file.read()
        want = bits_per_byte(folder, auto, data[len(data) - len(data) // 10:].decode(), 32)
        record(f"bits per byte, {name}", abs(bpb - want) < 1e-5 * want, ours=bpb, theirs=want)
        record(f"generate() after training here, {name}", answer == sample, train_loss=loss, answer=answer,
               sample=None if answer == sample else sample, tokenizer_class=type(auto).__name__)


def check_choices(work):
    """Multiple-choice questions: the sums that transformers' logits give must choose the same completions."""
    folder, rng = f"{work}/judge", random.Random(5)
    build(3).save_pretrained(folder)
    model = load(folder)
    questions = []
    for i in range(60):
        context = [rng.randrange(259) for _ in range(rng.randrange(1, 20))]
        questions.append((context, [[rng.randrange(259) for _ in range(rng.randrange(1, 10))] for _ in range(4)],
                          rng.randrange(4)))
    body, longest = [], 0
    for i, (context, completions, label) in enumerate(questions):
        words = [i, label, len(completions), len(context), *context]
        for completion in completions:
            words += [len(completion), *completion]
        size = 2 * (len(words) + 2)
        longest = max(longest, size)
        body += [65535, size, *words]
    header = np.zeros(256, dtype=np.int32)
    header[:4] = 20240522, 1, len(questions), longest
    with open(f"{work}/questions.bin", "wb") as file:
        file.write(header.tobytes() + np.array(body, dtype=np.uint16).tobytes())
    right_sum = right_mean = 0
    for context, completions, label in questions:
        sums = []
        for completion in completions:
            ids = context + completion
            with torch.no_grad():
                log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
            sums.append(sum(log_p[t - 1, ids[t]].item() for t in range(len(context), len(ids))))
        means = [total / len(completion) for total, completion in zip(sums, completions)]
        right_sum += int(np.argmax(sums)) == label
        right_mean += int(np.argmax(means)) == label
    said = run("./train", "--init-from", folder, "--steps", 0, "--eval-every", 0, "--seq", 32, "--batch", 8, "--out",
               f"{work}/judged", "--choices", f"{work}/questions.bin")
    want = f"{len(questions)} questions: accuracy {right_sum / 60:.4f} by summed log-probability, {right_mean / 60:.4f}"
    record("multiple choice", want in said, by_sum=right_sum / 60, by_mean=right_mean / 60, questions=60)


def bits_per_byte(folder, tokenizer, text, windows):
    """Of the validation text, by transformers and tokenizers alone."""
    model, T = load(folder), 128
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    nats = size = 0
    for w in range(windows):
        window = torch.tensor(ids[w * T:w * T + T + 1])
        with torch.no_grad():
            log_p = torch.log_softmax(model(window[None, :-1]).logits[0].double(), -1)
        nats -= log_p[torch.arange(T), window[1:]].sum().item()
        size += len(tokenizer.decode(window[1:], clean_up_tokenization_spaces=False).encode())
    return nats / np.log(2) / size


def check_tensorboard(work):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    folder = f"{work}/board/run"
    run("./train", "--steps", 30, "--log-every", 10, "--out", folder)
    run(sys.executable, "experiments/to_tensorboard.py", f"{work}/board")
    events = EventAccumulator(folder)
    events.Reload()
    with open(folder + "/log.jsonl", encoding="utf-8") as log:
        want = [(line["step"], line["loss"]) for line in map(json.loads, log) if "loss" in line]
    got = [(event.step, event.value) for event in events.Scalars("train/loss")]
    same = len(got) == len(want) and all(a[0] == b[0] and abs(a[1] - b[1]) <= 1e-6 * b[1] for a, b in zip(got, want))
    record("tensorboard reads our event files", same, tags=len(events.Tags()["scalars"]), points=len(got))


def main():
    global out, commit
    torch.set_num_threads(4)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with open(sys.argv[1], "w", encoding="utf-8") as out:
        work = tempfile.mkdtemp()
        commit = commit_of_program(work)
        tests = [check_models, check_upcycling, check_initial, check_choices, check_tensorboard]
        if len(sys.argv) > 2:
            tests += [functools.partial(check_tokenizers, path=sys.argv[2]),
                      functools.partial(check_text, path=sys.argv[2])]
        for test in tests:
            try:
                test(work)
            except Exception as error:  # one broken comparison must not hide the others
                record(f"{test} ended early", False, error=str(error)[:2000])
    print(f"{failures} failed")
    sys.exit(failures > 0)


main()
