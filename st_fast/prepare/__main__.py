"""Images → latents: makes the folder of shards that training reads. The same command again continues.

    python -m st_fast.prepare IMAGES OUT [options]      encode images
    python -m st_fast.prepare --verify OUT              re-read everything: hashes, CRCs, NaN, absurd values, labels
    python -m st_fast.prepare --stats OUT               per-channel statistics, class counts, OUT/stats.png
    python -m st_fast.prepare --features ENCODER IMAGES OUT   features of IMAGES beside OUT's latents, for REPA
    python -m st_fast.prepare --text ENCODER OUT        states of OUT's captions, for text to image
    python -m st_fast.prepare --from-latents DIR OUT    another project's latents, in any format that is read → shards
    python -m st_fast.prepare --from-repa DIR OUT       the same of REPA's vae-sd/*.npy
    python -m st_fast.prepare --from-coco DIR OUT       the same of U-ViT's coco256_features, with states of captions
    python -m st_fast.prepare --to-repa OUT DIR         shards → REPA's vae-sd/*.npy

IMAGES: a folder, zip or tar with one folder a class; webdataset tars; parquet files of the Hugging Face hub, or a
`save_to_disk` folder; IDX files as MNIST's; or images with EDM's and REPA's dataset.json. With --unlabelled or
--captions the images may lie in any folders. At the end the command that trains is printed; --recipe FILE writes a
recipe made for the set.

Examples:
    python -m st_fast.prepare ~/imagenet/train data/imagenet256 --size 256
    torchrun --nproc-per-node 8 -m st_fast.prepare ~/imagenet/train data/imagenet512 --size 512 --flip
    python -m st_fast.prepare cifar10.zip data/cifar10 --subset train --size 32 --vae small
    python -m st_fast.prepare cifar10.zip data/cifar10-pixels --subset train --size 32 --vae pixels
    python -m st_fast.prepare ~/imagenet/train data/imagenet256 --dry-run
    python -m st_fast.prepare ~/photos data/photos --unlabelled --recipe photos.toml
    python -m st_fast.prepare ~/pets data/pets --subset train --image-column photo --label-column breed
    python -m st_fast.prepare ~/photos data/photos256 --size 256 --buckets auto
    torchrun --nproc-per-node 8 -m st_fast.prepare --features facebook/dinov2-base ~/imagenet/train data/imagenet256
    python -m st_fast.prepare ~/coco/train2014 data/coco256 --captions ~/coco/annotations/captions_train2014.json
    python -m st_fast.prepare --text openai/clip-vit-large-patch14 data/coco256
"""

from collections.abc import Sequence

from st_fast.core.command import command_parser, run_command
from st_fast.core.errors import UserError
from st_fast.core.options import BATCH_MOST, COUNT_MOST, Parser, given, integer, number, path, pixels
from st_fast.core.signals import catch_signals

VAE_HELP = (
    "sd-vae-ft-mse (default), sd-vae-ft-ema, an AutoencoderKL, DC-AE or RAE as a folder or hub name, VA-VAE's .pt, "
    "small (train one on these images), pixels or pixels-gray (no VAE); with --stats: what decodes the picture"
)
SCALE_HELP = "instead of the VAE's scaling_factor, or of the scale that another project's code has"
FEATURES_HELP = (
    "a DINOv2, CLIP, MAE or I-JEPA, as a folder or hub name such as facebook/dinov2-base; small: train one on these "
    "images and their labels"
)
TEXT_HELP = "a CLIP, T5, Gemma or BERT, as a folder or hub name, or all-minilm-l6-v2"
IMAGE_COLUMN_HELP = "a table's column of images, or the suffix of webdataset's images (default: the only one, or image)"
LABEL_COLUMN_HELP = "a table's column of labels, or their key in the .json beside images (default: found, or label)"
SIZE_HELP = "pixels: ADM's centre crop to SIZE × SIZE (default 256), or to height × width"
BUCKETS_HELP = (
    "keep aspect ratios: a folder of latents for each of these (width:height), of at most SIZE × SIZE pixels; auto: "
    "1:1,4:3,3:4,3:2,2:3,16:9,9:16"
)
CAPTIONS_HELP = (
    "auto: the captions are in a .txt or .json beside each image, or in a table's column; else the file of COCO's "
    "annotations that has them"
)
POSTERIOR_HELP = (
    "sample: store the posterior's mean and std, of which each step draws; mean: the mean alone (default: as the VAE's "
    "authors use it)"
)
STATS_HELP = (
    "mean and std of each channel, by which latents are normalised instead of the VAE's own: a .pt, .safetensors or "
    ".json, or auto: measured on these images"
)
DEFAULT_VAE = "sd-vae-ft-mse"
COMPUTE = ("device", "precision")
FROM = (*COMPUTE, "vae", "vae_variant", "scale", "latents_stats", "dtype", "shard_size", "dry_run")
USES = {
    "verify": (),
    "stats": (*COMPUTE, "vae", "recipe"),
    "features": (*COMPUTE, "subset", "size", "batch_size", "dry_run"),
    "text": (*COMPUTE, "text_length", "text_mask", "batch_size", "dry_run"),
    "from_latents": (*FROM, "recipe"),
    "from_repa": (*FROM, "recipe"),
    "from_coco": FROM,
    "to_repa": ("dry_run",),
}
"""The options that mean something in a mode; to encode images all of them but TEXT_ONLY do."""
TEXT_ONLY = ("text_length", "text_mask")


def parser() -> Parser:
    """The command line."""
    parse = command_parser("prepare", __doc__)
    add = parse.add_argument
    add("paths", nargs="+", type=path, metavar="PATH", help="as above")
    mode = parse.add_mutually_exclusive_group()
    for name in ("verify", "stats", "from-latents", "from-repa", "from-coco", "to-repa"):
        mode.add_argument(f"--{name}", action="store_true", help="as above")
    mode.add_argument("--features", metavar="ENCODER", type=given, help=FEATURES_HELP)
    mode.add_argument("--text", metavar="ENCODER", type=given, help=TEXT_HELP)
    add("--size", type=pixels, default=256, metavar="SIZE|HEIGHTxWIDTH", help=SIZE_HELP)
    add("--buckets", type=given, metavar="auto|W:H,…", help=BUCKETS_HELP)
    add("--subset", default="", help="use only this folder of IMAGES (or this split), such as train")
    add("--unlabelled", action="store_true", help="all images are of one class, whatever folders they lie in")
    add("--image-column", type=given, metavar="NAME", help=IMAGE_COLUMN_HELP)
    add("--label-column", type=given, metavar="NAME", help=LABEL_COLUMN_HELP)
    add("--flip", action="store_true", help="encode every image mirrored, too: twice the records")
    add("--captions", type=given, metavar="auto|FILE", help=CAPTIONS_HELP)
    add("--text-length", type=integer(1, COUNT_MOST), help="tokens of a caption (default: CLIP's 77, else up to 128)")
    add("--text-mask", choices=("auto", "yes", "no"), default="auto", help="mask padding (default: all but CLIP do)")
    add("--vae", type=given, help=VAE_HELP)
    add("--vae-variant", metavar="NAME", help="of the VAE's weights, such as fp16 (default: those without a name)")
    add("--posterior", choices=("auto", "sample", "mean"), default="auto", help=POSTERIOR_HELP)
    add("--scale", type=number(1e-4, 1e4), help=SCALE_HELP)
    add("--latents-stats", type=given, metavar="FILE|auto", help=STATS_HELP)
    add(
        "--vae-factor",
        type=integer(2, 8),
        choices=(2, 4, 8),
        help="how much smaller its latents are (default: by SIZE, 2 to 8)",
    )
    add("--vae-steps", type=integer(1, COUNT_MOST), default=2_000, help="training steps of --vae small (default 2000)")
    add("--dtype", choices=("float16", "float32"), default="float16", help="of the stored moments (default float16)")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="of the network; auto: bf16 on CUDA")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--batch-size", type=integer(1, BATCH_MOST), default=32, help="images or captions encoded at once (default 32)")
    add("--shard-size", type=integer(1, COUNT_MOST), default=8_192, help="records a shard (default 8192)")
    add(
        "--max-bad",
        type=integer(0, 10**12),
        default=10,
        help="fail when more images than this can't be used (default 10)",
    )
    add("--recipe", type=path, metavar="FILE", help="write a recipe made for the set, to a new file")
    add("--dry-run", action="store_true", help="say what would be made, and stop")
    return parse


def as_typed(option: str, value: object) -> str:
    """An option with its value as a command has it; True is that of an option that takes none, a tuple is a size."""
    name = f"--{option.replace('_', '-')}"
    if value is True:
        return name
    return f"{name} {'x'.join(map(str, value)) if isinstance(value, tuple) else value}"


def main(arguments: Sequence[str]) -> None:
    """The command; see the module's text."""
    args = parser().parse_intermixed_args(arguments)
    needed = 1 if args.verify or args.stats or args.text else 2
    if len(args.paths) != needed:
        raise UserError(f"{needed} path{'s' * (needed - 1)} needed, got {len(args.paths)}: see --help")
    mode = next((mode for mode in USES if getattr(args, mode)), "encode")
    for option, value in vars(args).items():
        unused = option in TEXT_ONLY if mode == "encode" else option not in (*USES[mode], *USES, "paths")
        if (unused or (option == "vae_steps" and args.vae != "small")) and value != parser().get_default(option):
            where = "images to encode" if mode == "encode" else f"--{mode.replace('_', '-')}"
            where = where if unused else f"--vae {args.vae or DEFAULT_VAE}"
            raise UserError(f"{as_typed(option, value)}: means nothing with {where}; leave it out")
    if mode not in ("stats", "from_latents", "from_repa", "from_coco"):
        args.vae = args.vae or DEFAULT_VAE
    if args.max_bad < 0:
        raise UserError(f"--max-bad {args.max_bad}: at least 0")
    if args.vae_factor and args.vae != "small":
        raise UserError(f"--vae-factor {args.vae_factor}: is of --vae small; --vae {args.vae} has its own")
    if args.recipe and args.captions:
        raise UserError("--recipe: with --captions it follows the text encoder: begin with recipes/mmdit_coco.toml")
    size = args.size if isinstance(args.size, tuple) else (args.size,)
    if args.vae_factor and any(side % args.vae_factor or side < 2 * args.vae_factor for side in size):
        named = "x".join(map(str, size))
        raise UserError(f"--size {named}: a multiple of --vae-factor {args.vae_factor}, at least twice it, is needed")
    if len(size) > 1 and (args.buckets or args.features):
        why = "--buckets takes one side, of the square" if args.buckets else "image encoders take squares"
        raise UserError(f"--size {'x'.join(map(str, size))}: {why}")
    if args.buckets:
        from st_fast.prepare.bucket_command import encode

        encode(args)
        return
    from st_fast.prepare import commands

    getattr(commands, mode)(args)


if __name__ == "__main__":
    catch_signals()
    run_command(main)
