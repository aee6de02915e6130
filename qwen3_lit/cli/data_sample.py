"""``qwen3-lit data sample``: sample responses of a checkpoint to problems and keep the right ones."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen3_lit.data.tokenizer import TextTokenizer
    from qwen3_lit.generation.engine import PagedEngine
    from qwen3_lit.generation.protocol import RolloutEngine

HELP = (
    "Answer problems with a Hugging Face folder, verify the answers and write conversations. Started again after a "
    "kill, the same command continues and gives the same file."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("model", metavar="HF_DIR", help="Hugging Face folder with weights and tokenizer")
    parser.add_argument(
        "problems", metavar="PROBLEMS", help="problem records, or conversations whose queries are answered anew"
    )
    parser.add_argument("--out", required=True, help="JSON lines file for the kept conversations")
    parser.add_argument("--report", help="JSON file for the counts and accuracies")
    parser.add_argument(
        "--engine",
        default="paged",
        help="paged (ours, the default), vllm, or the URL of an OpenAI-compatible server that serves HF_DIR and "
        "returns token ids, such as http://127.0.0.1:8000/v1",
    )
    parser.add_argument("--served-model", help="the server's name of the model (default: HF_DIR)")
    parser.add_argument("--n", type=int, default=4, help="responses a problem and mode (default 4)")
    parser.add_argument("--mode", choices=("think", "no_think", "both"), default="think", help="default think")
    parser.add_argument("--keep", choices=("correct", "all", "best"), default="correct", help="default correct")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="longest response (default 1024)")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy (default 0.6)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus (default 1)")
    parser.add_argument("--top-k", type=int, default=0, help="most likely tokens to draw from, 0 for all (default 0)")
    parser.add_argument("--thinking-budget", type=int, help="most thinking tokens before the answer is asked for")
    parser.add_argument("--limit", type=int, help="use the first so many problems")
    parser.add_argument("--chunk", type=int, default=64, help="problems answered together (default 64)")
    parser.add_argument("--max-batch-size", type=int, default=256, help="sequences decoded together (default 256)")
    parser.add_argument("--max-cached-tokens", type=int, default=131072, help="size of the cache (default 131072)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default 0)")
    parser.add_argument("--workers", type=int, default=1, help="verifier processes (default 1)")
    parser.add_argument("--deadline", type=float, default=10.0, help="seconds one verification may take (default 10)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default auto)")
    parser.add_argument(
        "--on-bad-record", choices=("raise", "skip"), default="raise", help="stop at a bad record, or leave it out"
    )


def load_engine(folder: str, device: str, **options: int) -> tuple["PagedEngine", "TextTokenizer"]:
    """Engine and tokenizer of a Hugging Face folder: fp32 on the CPU, bf16 on a GPU."""
    import torch

    from qwen3_lit.curation.rejection_sampling import best_device
    from qwen3_lit.data.tokenizer import check_tokenizer_fits, load_tokenizer
    from qwen3_lit.generation.engine import PagedEngine
    from qwen3_lit.model.hf_checkpoint import load_hf

    place = best_device(device)
    tokenizer = load_tokenizer(folder)
    model = load_hf(folder, dtype=torch.float32 if place.type == "cpu" else torch.bfloat16).to(place)
    check_tokenizer_fits(tokenizer, model.config.vocab_size, folder)
    return PagedEngine.for_tokenizer(model, tokenizer, **options), tokenizer


def load_rollout_engine(args: argparse.Namespace) -> tuple["RolloutEngine", "TextTokenizer"]:
    """What ``--engine`` names, and the folder's tokenizer.

    Raises:
        UserError: no such engine, or vLLM is not installed.
    """
    from qwen3_lit.data.tokenizer import check_tokenizer_fits, load_tokenizer
    from qwen3_lit.errors import UserError
    from qwen3_lit.generation.openai_engine import OpenAIEngine
    from qwen3_lit.generation.thinking import ThinkingTokens
    from qwen3_lit.generation.vllm_engine import VLLMEngine
    from qwen3_lit.model.hf_checkpoint import read_hf_config

    if args.engine == "paged":
        sizes = {"max_batch_size": args.max_batch_size, "max_cached_tokens": args.max_cached_tokens}
        return load_engine(args.model, args.device, **sizes)
    tokenizer, vocab_size = load_tokenizer(args.model), read_hf_config(args.model).vocab_size
    check_tokenizer_fits(tokenizer, vocab_size, args.model)
    options: dict[str, Any] = {
        "stop_token_ids": (tokenizer.im_end_id, tokenizer.end_of_text_id),
        "unused_token_ids": range(len(tokenizer), vocab_size),
        "thinking": ThinkingTokens.of(tokenizer),
    }
    if args.engine == "vllm":
        return VLLMEngine(args.model, **options), tokenizer
    if args.engine.startswith(("http://", "https://")):
        return OpenAIEngine(args.engine, args.served_model or args.model, **options), tokenizer
    raise UserError(f"--engine {args.engine}: expected paged, vllm, or a URL such as http://127.0.0.1:8000/v1")


def run(args: argparse.Namespace) -> int:
    """Sample with a progress bar and print the accuracies."""
    from rich.console import Console
    from rich.progress import Progress

    from qwen3_lit.curation.rejection_sampling import SampleConfig, checkpoint_identity, read_queries, sample_responses
    from qwen3_lit.curation.verification import AnswerVerifier
    from qwen3_lit.errors import UserError
    from qwen3_lit.rl.environment import CalculatorEnvironment

    config = SampleConfig(
        n=args.n,
        mode=args.mode,
        keep=args.keep,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        thinking_budget=args.thinking_budget,
        chunk_problems=args.chunk,
        seed=args.seed,
    )
    config.params()  # bad values are refused before anything is loaded
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: expected 1 or more")
    problems = read_queries(args.problems, args.on_bad_record, args.limit)
    engine, tokenizer = load_rollout_engine(args)
    console = Console(file=sys.stderr)
    with (
        AnswerVerifier(num_workers=args.workers, deadline_seconds=args.deadline) as verifier,
        Progress(console=console, transient=True) as bar,
    ):
        job = bar.add_task(f"answering {len(problems)} problems", total=None)
        result = sample_responses(
            engine,
            tokenizer,
            problems,
            args.out,
            config=config,
            verifier=verifier,
            source=checkpoint_identity(args.model),
            environments=[CalculatorEnvironment()],
            report=args.report,
            progress=lambda done, total, kept: bar.update(
                job, completed=done, total=total, description=f"answering {len(problems)} problems, kept {kept}"
            ),
        )
    console.print(f"{args.out}: kept {result['kept']} of {result['sampled']} responses", highlight=False)
    for task, accuracies in result["tasks"].items():
        shown = ", ".join(f"{mode} {accuracy:.1%}" for mode, accuracy in accuracies.items())
        console.print(f"  {task}: right {shown}", highlight=False)
    for reason, count in result["dropped"].items():
        console.print(f"  dropped {reason}: {count}", highlight=False)
    return 0
