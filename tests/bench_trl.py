"""A step of GRPO here and in TRL's GRPOTrainer: seconds and memory of each, on the same work.

    pip install -r tests/requirements-peers.txt
    python tests/bench_trl.py MODEL            # a folder with a chat model, trained in float32
    python tests/bench_trl.py MODEL --small    # 4 layers, 128 wide, random; tokenizer of MODEL
    python tests/bench_trl.py MODEL --dtype bfloat16    # this side only, with float32 masters
    python tests/bench_trl.py MODEL --rows 8   # TRL computes 8 rows at a time, not all 32

The two sides take turns in one run. With 24 GB and 135M parameters, TRL needs `--rows 8`.

A step: 4 tasks, 8 attempts each, 64 sampled tokens in every attempt, prompts that carry the schema
of a tool, one update. Both sides get the same prompt tokens (asserted), AdamW, no KL term, no
gradient checkpointing, and rewards that do not depend on what was sampled: every group has signal.
In a second race, named "half silent", two of the four groups have none. Each side lives in a
process of its own, so that its peak memory is its own. The other one sleeps while it works.
Sampling is not compared.
"""

import argparse
import contextlib
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))

TASKS, GROUP, TOKENS = 4, 8, 64
QUESTIONS = [f"Who wrote the letter number {n} of the archive, and to whom was it sent?"
             for n in (17, 254, 391, 408)]


def reward(number: int, silent: int) -> float:
    """Of attempt `number`: half of a group succeeds, but for the groups that are silent."""
    return float(number % 2 and number // GROUP >= silent)


# No annotation of what it returns: TRL would put it into the schema.
# The long lines are part of the prompt that was measured.
def search_archive(query: str, year: int, limit: int):
    """Search the archive of letters, which holds about forty thousand scanned letters between writers, their publishers and their
    families, transcribed by volunteers; the transcriptions are not complete, and names are spelled as they stand in the letter.

    Args:
        query: Words to look for in the transcription, in the names of sender and receiver, and in the notes that the archivists made
        year: The year in which the letter was written, or 0 if any year will do; undated letters are found only with 0
        limit: How many letters to return at most, the best matches first; from 1 to 20, and more than 10 are seldom of use
    """  # noqa: E501
    return "No letter matches."


class Archive:
    """The task as an environment of this project; its reward is that of the attempt's number."""

    done, state = False, ""

    def __init__(self, number: int, silent: int):
        self._number, self._silent = number, silent

    def reset(self, seed: int) -> str:
        return QUESTIONS[seed]

    def get_reward(self) -> float:
        return reward(self._number, self._silent)

    search_archive = staticmethod(search_archive)


def load(options):
    """(model, tokenizer): float32, with a chat template that both sides know how to follow."""
    import torch
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    template = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
    tokenizer.chat_template = template.read_text()
    if options.small:
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4, intermediate_size=512,
            num_attention_heads=4, tie_word_embeddings=True)), tokenizer
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32), tokenizer


def here(options, pipe) -> None:
    """Steps of this project, one for each message: the number of silent groups."""
    import torch

    from agent import Agent, Chat
    from grpo import GRPOConfig, compute_in, make_rows, masters, update
    from rollout import Engine, play

    model, tokenizer = load(options)
    chat, config = Chat(tokenizer), GRPOConfig(epochs=1)
    # No stop tokens: every attempt has its 64.
    engine = Engine(model, set(), slots=TASKS * GROUP, context=1024)
    compute_in(model, getattr(torch, options.dtype))
    optimizer = torch.optim.AdamW(masters(model), lr=1e-6, weight_decay=0.0)

    def step(silent: int, number: int) -> tuple[list[int], float]:
        def start(n: int):
            agent = Agent(engine, chat, max_turns=1, max_new_tokens=TOKENS, context=1024)
            return agent.run(Archive(n, silent), n // GROUP, Random(f"{number} {n}"))

        episodes = play([lambda n=n: start(n) for n in range(TASKS * GROUP)], TASKS * GROUP)
        for n, e in enumerate(episodes):
            e.group = n // GROUP
        rows, _, _ = make_rows(episodes, config)
        report = update(model, optimizer, rows, config)
        assert all(sum(e.segments[0].sampled) == TOKENS for e in episodes)
        segments = [e.segments[0] for e in episodes[::GROUP]]
        return [s.ids[: s.sampled.index(True)] for s in segments], report["kl_to_sampler"]

    pipe.send("ready")
    for number, silent in enumerate(iter(pipe.recv, None)):
        began = time.perf_counter()
        prompts, kl = step(silent, number)
        pipe.send((time.perf_counter() - began, peak_memory(), prompts, kl))


def there(options, pipe) -> None:
    """Steps of TRL, one for each message."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = load(options)
    silent, began = 0, 0.0

    def rewards(completions, **_):
        return [reward(n, silent) for n in range(len(completions))]

    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            nonlocal silent, began
            order = pipe.recv()
            control.should_training_stop = order is None
            silent, began = order or 0, time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            if not control.should_training_stop:
                pipe.send((time.perf_counter() - began, peak_memory(), prompts()))

    def prompts() -> list[list[int]]:
        return [tokenizer.apply_chat_template([{"role": "user", "content": q}],
                                              tools=[search_archive], add_generation_prompt=True,
                                              return_dict=False) for q in QUESTIONS]

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, num_generations=GROUP,
            per_device_train_batch_size=options.rows,
            gradient_accumulation_steps=TASKS * GROUP // options.rows,
            max_completion_length=TOKENS, generation_kwargs={"min_new_tokens": TOKENS},
            gradient_checkpointing=False, beta=0.0, learning_rate=1e-6, max_steps=10**6,
            save_strategy="no", report_to=[], logging_steps=10**6, shuffle_dataset=False,
            disable_tqdm=True)
        asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
        trainer = GRPOTrainer(model=model, processing_class=tokenizer, reward_funcs=rewards,
                              args=config, tools=[search_archive], callbacks=[Turns()],
                              train_dataset=Dataset.from_list([{"prompt": p} for p in asked]))
        pipe.send("ready")
        trainer.train()


def peak_memory() -> float:
    """MB, of this process since it began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def work(side, options, pipe) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    with contextlib.redirect_stdout(sys.stderr):
        side(options, pipe)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a causal language model")
    parser.add_argument("--small", action="store_true",
                        help="a small random model with its vocabulary")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"),
                        help="to compute in, on this side")
    parser.add_argument("--rows", type=int, default=TASKS * GROUP,
                        help="of one of TRL's backward passes; fewer take less memory")
    parser.add_argument("--rounds", type=int, default=3,
                        help="steps of each side in each race, after one to warm up")
    options = parser.parse_args()
    context, pipes = multiprocessing.get_context("spawn"), {}
    for name, side in (("here", here), ("TRL", there)):
        pipes[name], end = context.Pipe()
        context.Process(target=work, args=(side, options, end), daemon=True).start()
        end.close()  # or its death would go unnoticed
    def receive(name: str):
        try:
            return pipes[name].recv()
        except EOFError:
            raise SystemExit(f"{name} has died, maybe for want of memory") from None

    for name in pipes:
        receive(name)

    def race(silent: int, rounds: int) -> dict[str, list]:
        results = {name: [] for name in pipes}
        for _ in range(rounds):
            for name, pipe in pipes.items():
                pipe.send(silent)
                results[name].append(receive(name))
        return results

    first = race(0, 1)
    prompts = first["here"][0][2]
    if prompts != first["TRL"][0][2]:
        raise SystemExit("the two sides were given different prompts")
    print(f"{options.model}{' (small)' if options.small else ''}: {TASKS} x {GROUP} attempts of "
          f"{TOKENS} tokens behind prompts of {', '.join(str(len(p)) for p in prompts)} tokens; "
          "seconds per step (least, most), peak memory of the process", flush=True)
    for title, silent in (("all groups with signal", 0), ("half silent", TASKS // 2)):
        results = race(silent, options.rounds)
        seconds = {name: [r[0] for r in rs] for name, rs in results.items()}
        ratio = statistics.median(b / a for a, b in zip(seconds["here"], seconds["TRL"]))
        for name, s in seconds.items():
            print(f"  {title:24} {name:5} {statistics.median(s):8.2f} s ({min(s):.2f}, "
                  f"{max(s):.2f})  {results[name][-1][1]:8,.0f} MB", flush=True)
        print(f"  {title:24} TRL takes {ratio:.1f} times as long (median of the rounds); "
              "KL between sampling and training here "
              f"{results['here'][-1][3]:.1e}", flush=True)
    for pipe in pipes.values():
        pipe.send(None)


if __name__ == "__main__":
    main()
