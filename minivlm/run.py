"""The command line: `python -m minivlm.run`.

Reads the arguments before anything heavy is imported: `--help` and a misspelt flag answer at once. The answer goes to
stdout as it is generated, everything else to stderr. Exit codes: 0 done, 1 an error, 2 a command that makes no sense.
Conversations live in `chat.py`, files of questions in `batch.py`, what is shown before a model runs in `preview.py`.
"""

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path

from minivlm.console import explain, messages_of, note
from minivlm.errors import MinivlmError

QUESTION, FILM_QUESTION = "Describe the picture.", "Describe the video."  # when no question is asked

EXAMPLES = """\
examples:
  minivlm                                                 the bundled demo model describes a bundled picture
  minivlm --prompt "How many shapes are there?"           another question about it
  minivlm --ckpt llava-v1.6 --image cat.jpg -p "What is this?"
  minivlm --ckpt ./my-llava --image a.png --image b.png -p "What has changed?" --temperature 0.7 --seed 1
  minivlm --ckpt llava-v1.6 --image cat.jpg --dry-run     prompt, tiles, tokens and memory; reads no weights
  minivlm --ckpt llava-onevision --video cat.mp4 --num-frames 16 -p "What happens?"
  minivlm --ckpt llava-v1.6 --chat --image cat.jpg        a conversation
  minivlm --ckpt llava-v1.6 --batch questions.jsonl --output answers.jsonl

`minivlm` and `python -m minivlm.run` are the same command. The answer goes to stdout, notes and errors to stderr.
Exit codes: 0 done, 1 an error (one line says what was wrong and what to do), 2 the command was not understood.
"""

# What cannot stand together: the first makes no sense with any of the others.
CONFLICTS = {
    "batch": (
        "prompt", "image", "video", "fps", "num_frames", "system", "messages", "raw", "chat", "json", "show_prompt",
        "dry_run",
    ),
    "chat": ("messages", "raw", "json", "show_prompt", "dry_run"),
    "messages": ("prompt", "image", "video", "fps", "num_frames", "system", "raw"),
    "raw": ("system", "fps", "num_frames"),
    "fps": ("num_frames",),
    "dry_run": ("json", "stats"),
}  # fmt: skip
SAMPLING = (
    "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "num_beams", "stop", "seed",
)  # fmt: skip


TEXT, FILE, FLAG = {"metavar": "TEXT"}, {"metavar": "FILE"}, {"action": "store_true"}

FLAGS = {  # group → (names, argparse's options, help)
    "the model": [
        ("--ckpt --model --model-path", {"metavar": "NAME"},
         "an alias (see --list), a hub id, or a folder laid out as on the hub (default: the bundled demo model)"),
        ("--list", FLAG, "list the aliases, their sizes, and which are on this disk"),
        ("--revision", {"metavar": "REV"}, "branch, tag or commit on the hub (default: main)"),
        ("--offline", FLAG, "use what is on disk and never ask the hub"),
        ("--device", {}, "auto, cpu, cuda or cuda:1 (default: auto, a GPU if there is one)"),
        ("--dtype", {"choices": ["auto", "float32", "bfloat16", "float16"]},
         "numbers to compute with (default: auto, the checkpoint's own; on a CPU bfloat16 or float32)"),
        ("--kernels", {"choices": ["auto", "reference", "fused"]},
         "the hand-written kernels or their PyTorch references (default: auto, kernels where they can be compiled)"),
    ],
    "the question": [
        ("--prompt -p", TEXT, f'what to ask (default: "{QUESTION}")'),
        ("--image -i", {"metavar": "X", "action": "append"},
         "a picture: file, http(s) URL or data: URI; repeat it for several, in order (default, with the demo model: "
         "a bundled picture)"),
        ("--video", {"metavar": "X", "action": "append"},
         "a film: file, http(s) URL or data: URI; repeat it for several, in order"),
        ("--fps", {"metavar": "F", "type": float},
         "look at this many frames of each second of a film (default: what the model was trained with)"),
        ("--num-frames", {"metavar": "N", "type": int}, "look at this many frames of a film, evenly spaced"),
        ("--min-pixels", {"metavar": "N", "type": int},
         "Qwen2-VL: enlarge pictures, and frames of films, to at least this area (default: the checkpoint's)"),
        ("--max-pixels", {"metavar": "N", "type": int}, "Qwen2-VL: shrink them to at most this area"),
        ("--system", TEXT, "a system message before the question"),
        ("--raw", FLAG,
         "the prompt is already rendered: no chat template; it holds one placeholder, such as <image>, per picture "
         "or film"),
        ("--messages", FILE,
         'a conversation as JSON: [{"role": "user", "content": [{"type": "image", "image": "cat.jpg"}, '
         '{"type": "text", "text": "What is this?"}]}]'),
        ("--chat", FLAG, "a conversation in the terminal; /help there says what it knows"),
        ("--batch", FILE,
         'one question a line: {"prompt": "What is this?", "images": ["cat.jpg"]} or {"messages": [...]}, with '
         '"videos" and an "id" if you like; paths start from the current folder; needs --output'),
        ("--output", FILE,
         "where --batch writes one answer or error a line; called again, it goes on where it stopped"),
    ],
    "the answer": [
        ("--sampling", {"choices": ["greedy", "checkpoint"]},
         "checkpoint: as its generation_config.json says, but for the flags below that are given (default: greedy)"),
        ("--max-new-tokens", {"metavar": "N", "type": int}, "stop after this many tokens (default: 256)"),
        ("--temperature", {"metavar": "T", "type": float},
         "0 always takes the likeliest token; higher is more varied (default: 0)"),
        ("--top-p", {"metavar": "P", "type": float},
         "sample among the likeliest tokens that together reach this probability (default: 1, all)"),
        ("--top-k", {"metavar": "K", "type": int}, "sample among the K likeliest tokens (default: 0, all)"),
        ("--min-p", {"metavar": "P", "type": float},
         "sample among tokens at least P times as likely as the likeliest (default: 0, all)"),
        ("--repetition-penalty", {"metavar": "R", "type": float}, "above 1 avoids what was already said (default: 1)"),
        ("--num-beams", {"metavar": "N", "type": int},
         "beam search over N candidates; prints once it is done (default: 1)"),
        ("--stop", TEXT | {"action": "append"}, "end the answer before this text; repeatable"),
        ("--seed", {"metavar": "N", "type": int}, "makes sampling repeatable"),
    ],
    "what is shown": [
        ("--json", FLAG,
         "one JSON object instead of text: text, token_ids, prompt_token_ids, finish_reason, stats"),
        ("--stats", FLAG, "times, tokens per second and peak memory, on stderr"),
        ("--show-prompt", FLAG, "the exact prompt, on stderr; a run of image tokens as <image>×576"),
        ("--dry-run", FLAG, "prompt, tiles, frames, token counts and memory needed; reads no weights"),
        ("--debug", FLAG, "a traceback where an error would be one line"),
        ("--version", FLAG, "the versions of minivlm, Python and torch"),
    ],
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minivlm",
        usage="%(prog)s [--ckpt NAME] [--image X] [--video X] [--prompt TEXT] [flags below]",
        description="Ask a vision-language model about pictures and films. Without arguments, a small trained model\n"
        "that ships with the package describes a picture that ships with it: no download, no GPU.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # what was not given is absent: a default has one place, and it is not here
    )
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for names, options, text in flags:
            group.add_argument(*names.split(), help=text, **options)
    return parser


def parse(argv: list[str]) -> dict:
    """The given arguments, and nothing else, by name with underscores. A command that makes no sense exits with 2."""
    parser = build_parser()
    # `--max_new_tokens=5` is `--max-new-tokens=5`: the name of a flag, not its value.
    spelled = [
        flag.replace("_", "-") + equals + value if flag.startswith("--") else flag + equals + value
        for flag, equals, value in (argument.partition("=") for argument in argv)
    ]
    given = vars(parser.parse_args(spelled))
    for one, others in CONFLICTS.items():
        for other in others:
            if one in given and other in given:
                parser.error(f"{as_flag(one)} and {as_flag(other)} do not go together")
    if ("batch" in given) != ("output" in given):
        parser.error("--batch FILE and --output FILE go together")
    if "raw" in given and "prompt" not in given:
        parser.error("--raw needs a --prompt")
    if "ckpt" in given and not given.keys() & {"prompt", "image", "video", "messages", "chat", "batch", "list"}:
        parser.error("nothing to answer: give --prompt, --image, --video, --messages, --chat or --batch")
    for name in ("fps", "num_frames"):
        if name in given and not given.keys() & {"video", "chat"}:
            parser.error(f"{as_flag(name)} needs a --video")
        if not given.get(name, 1) > 0:
            parser.error(f"{as_flag(name)} is above 0")
    if "revision" in given and "ckpt" not in given:
        parser.error("--revision needs a --ckpt on the hub")
    return given


def as_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without an answer's letters is no reason to stop
    try:
        code = dispatch(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        note("stopped")
        return 1
    except Exception as error:
        if "debug" in args:
            traceback.print_exc()
        note(explain(error))
        return 1
    return code


def dispatch(args: dict) -> int:
    if "version" in args:
        return show_version()
    if "list" in args:
        return show_list()
    import_torch()
    from minivlm.sampling import Sampling

    sampling = {name: args[name] for name in SAMPLING if name in args}
    try:
        Sampling(**sampling)
    except MinivlmError as error:
        note(explain(error))
        return 2
    question = None if args.keys() & {"batch", "chat"} else question_of(args)
    begun = time.perf_counter()
    vlm = open_vlm(args, weights="dry_run" not in args)
    load_seconds = time.perf_counter() - begun
    if args.get("sampling") == "checkpoint":
        sampling = checkpoint_sampling(vlm.folder) | sampling
        note(f"sampling: {', '.join(f'{name} {value}' for name, value in sampling.items()) or 'greedy'}")
    if "dry_run" in args:
        from minivlm.preview import preview

        print(preview(vlm, question, args.get("max_new_tokens", Sampling().max_new_tokens)))
        return 0
    if "batch" in args:
        from minivlm.batch import run_batch

        return run_batch(vlm, Path(args["batch"]), Path(args["output"]), sampling, "stats" in args, "debug" in args)
    if "chat" in args:
        from minivlm.chat import Chat

        chat = Chat(vlm, sampling, args.get("system"), "debug" in args, film_options_of(args))
        return chat.run(args.get("prompt"), args.get("image", []), args.get("video", []))
    return answer(vlm, question, sampling, args, load_seconds)


def import_torch() -> None:
    """Without the search for garbage: time and again Python would look through all that torch makes, and find none."""
    if "torch" not in sys.modules:
        import gc

        gc.disable()
        import torch  # noqa: F401

        gc.freeze()  # nor later: a fifth of a second in all, of a demo that takes one and a half
        gc.enable()


def open_vlm(args: dict, weights: bool):
    """The checkpoint that the arguments name, by default the bundled one."""
    from minivlm import ops
    from minivlm.vlm import load

    if "kernels" in args:
        ops.set_backend(args["kernels"])
    given = {name: args[name] for name in ("device", "dtype", "revision", "offline") if name in args}
    vlm = load(args["ckpt"] if "ckpt" in args else demo_checkpoint(), weights=weights, **given)
    limits = {name: args[name] for name in ("min_pixels", "max_pixels") if name in args}
    if limits:
        vlm.processor.images = vlm.processor.override(limits)
    if vlm.device.type == "cpu":
        keep_freed_memory()
    return vlm


def keep_freed_memory() -> None:
    """Up to half a gigabyte that tensors leave stays with the process for the next ones, where the C library is glibc.

    By itself it gives a large block back to the system, which then clears fresh pages for the next tensor of that size:
    5 to 20 % of a vision tower's time. Not a part of `load`, which has no say in how its caller's program handles
    memory, and only behind it, so that what loading needs for a moment is not kept.
    """
    import ctypes

    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
        libc.mallopt(mmap_threshold, 32 * 2**20)  # the most that it takes; larger blocks come and go as before
        libc.mallopt(trim_threshold, 2**29)


def demo_checkpoint() -> Path:
    from minivlm.demo import DEMO_CHECKPOINT

    note("no --ckpt: the bundled demo model answers, which knows posters of shapes, words and numbers only")
    return DEMO_CHECKPOINT


def question_of(args: dict):
    """The conversation, or the rendered prompt, that the arguments describe."""
    if "messages" in args:
        return read_messages(Path(args["messages"]))
    images, films = args.get("image", []), args.get("video", [])
    if not images and not films and "ckpt" not in args:
        from minivlm.demo import DEMO_PICTURE

        images = [str(DEMO_PICTURE)]
        note(f"no --image: the bundled picture {DEMO_PICTURE}")
    if "raw" in args:
        from minivlm.inputs import Prompt

        return Prompt(args["prompt"], images, films)
    question = FILM_QUESTION if films and not images else QUESTION
    if "prompt" not in args:
        note(f"no --prompt: {question}")
    return messages_of(args.get("prompt", question), images, args.get("system"), films, film_options_of(args))


def film_options_of(args: dict) -> dict:
    return {name: args[name] for name in ("fps", "num_frames") if name in args}


def read_messages(path: Path) -> list[dict]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MinivlmError(f"--messages {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise MinivlmError(f"--messages {path} is not JSON in UTF-8: {error}") from error


def checkpoint_sampling(folder: Path) -> dict:
    """What generation_config.json says, with transformers' defaults where it is silent; greedy unless `do_sample`."""
    from minivlm.files import read_json

    names, found = ["repetition_penalty", "num_beams"], {}
    config = read_json(folder / "generation_config.json")
    if config.get("do_sample"):
        names += ["temperature", "top_k", "top_p", "min_p"]
        found = {"temperature": 1.0, "top_k": 50}
    return found | {name: config[name] for name in names if config.get(name) is not None}


def answer(vlm, question, sampling: dict, args: dict, load_seconds: float) -> int:
    """One question: its answer streams to stdout, or stands in one JSON object."""
    if "show_prompt" in args:
        from minivlm.preview import keep_films, show_prompt

        question, _ = keep_films(question)
        prompt_token_ids = vlm.preprocess([question]).input_ids[0].tolist()
        print(show_prompt(prompt_token_ids, vlm.processor.tokenizer), file=sys.stderr)
    if "json" in args:
        (result,) = vlm.generate([question], **sampling)
    else:
        stream = vlm.stream(question, **sampling)
        for piece in stream:
            print(piece, end="", flush=True)
        print()
        result = stream.result
    stats = {"load_seconds": load_seconds, **result.stats, "peak_memory_bytes": peak_memory(vlm)}
    if "json" in args:
        shown = {
            "text": result.text,
            "token_ids": result.token_ids,
            "prompt_token_ids": result.prompt_token_ids,
            "finish_reason": result.finish_reason,
            "stats": stats,
        }
        print(json.dumps(shown, ensure_ascii=False))
    if "stats" in args:
        for name, value in stats.items():
            print(f"{name:24}{value:,.3f}" if isinstance(value, float) else f"{name:24}{value:,}", file=sys.stderr)
    return 0


def peak_memory(vlm) -> int:
    """The most bytes that were held at once: on the GPU where the model is there, else by this process."""
    if vlm.device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(vlm.device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def show_list() -> int:
    from minivlm.hub import list_known

    print(f"{'alias':32}{'size':>10}  {'on disk':9}repository")
    for known in list_known():
        print(f"{known.alias:32}{known.gigabytes:>7.1f} GB  {'yes' if known.on_disk else 'no':9}{known.repository}")
    return 0


def show_version() -> int:
    import platform

    import torch

    from minivlm import __version__

    print(f"minivlm {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
