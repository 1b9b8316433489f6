"""Every flag of train.py, with its default and its meaning, and the recipes that override the defaults.

Nothing heavy is imported here, so that `python train.py --help` and a mistyped flag answer before torch is loaded.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd import BadInput, cli
from kd.augmentations import AUGMENTATIONS
from kd.cli import flag

METHODS = ("kd", "hard", "dkd", "dist", "nkd", "pkt", "rkd", "simkd")
# Methods that read the label of every picture, that compare pooled features, and that can be standardised.
NEED_LABELS, ON_FEATURES, STANDARDISABLE = {"dkd", "nkd"}, {"pkt", "rkd", "simkd"}, {"kd", "dkd", "dist"}


@dataclass(frozen=True)
class Config:
    """The settings of a run. These defaults are the recipe "tutorial". Without --recipe, "demo" overrides some."""

    # What people turn first
    recipe: str = flag("demo", "settings to start from; flags override them", ("demo", "tutorial", "best", "few"))
    dataset: str = flag("beans", "leaves (drawn, offline), a Hub dataset id, or a folder")
    teacher: str = flag("resnet50", "timm model that teaches; or hf-hub:OWNER/NAME, local-dir:FOLDER")
    student: str = flag("mobilenetv2_100", "timm model that learns; named in the same way")
    size: int = flag(224, "side of the square input, in pixels", low=16)
    epochs: int = flag(30, "epochs of the student and of its control", low=1)
    lr: float = flag(5e-5, "peak learning rate of the student and of its control", above=0)
    augment: str = flag("none", "what a view may change (flip, crop: also upside down; flip-x, crop-x: mirrored only; "
                        "crop-only: neither)", tuple(AUGMENTATIONS))
    views: int = flag(1, "K, the number of views of a picture: epoch e sees view e mod K; 0: a fresh one each epoch",
                      low=0)
    temperature: float = flag(5.0, "T, softens the outputs of teacher and student (kd, dkd, nkd, dist)", above=0,
                              high=1000)
    kd_weight: float = flag(0.5, "λ, the teacher's share of the loss", low=0, high=1)
    control: bool = flag(False, "also train the same student without the teacher, to compare")

    # The run
    seed: int = flag(0, "decides weights, order and views: the same seed gives the same run", low=0, high=2**32 - 1)
    out: str = flag("", "folder of the run (default: runs/RECIPE, or runs/RECIPE-DATASET where the data are not the "
                    "recipe's own)", free=True)
    resume: bool = flag(False, "go on with the run in --out, exactly where it stopped", free=True)
    overwrite: bool = flag(False, "replace the run in --out", free=True)
    save_minutes: float = flag(10.0, "a checkpoint this often, and after every epoch", low=0, free=True)
    quiet: bool = flag(False, "print nothing but the closing line of JSON, and errors", free=True)
    push_to_hub: str = flag("", "at the end, upload the student to this Hub repository, such as someone/student",
                            free=True)

    # Data
    config: str = flag("", "configuration of --dataset, where it has several")
    image: str = flag("", "column of --dataset with the pictures, where that cannot be told")
    label: str = flag("", "column of --dataset with the labels, where that cannot be told")
    labels: int = flag(0, "keep that many labels of train, drawn by --seed, equally many of each class; the student "
                       "learns the other pictures from its teacher only; 0: all labels", low=0)
    unlabelled: str = flag("", "more pictures for the student, without labels: a folder or a data set")
    cache_dir: str = flag(cli.CACHE_DIR, "where decoded pictures and the teacher's logits are kept", free=True)

    # The teacher, fine-tuned before it teaches, with the optimizer settings below
    teacher_weights: str = flag("imagenet", "imagenet (timm's, or those of that repository or folder), none (random), "
                                "a weights file, or a saved folder")
    teacher_epochs: int = flag(8, "epochs of fine-tuning before it teaches; 0: as loaded", low=0)
    teacher_lr: float = flag(1e-3, "peak learning rate of the fine-tuning", above=0)
    teacher_augment: str = flag("crop-x", "what a view may change in the fine-tuning", tuple(AUGMENTATIONS))
    teacher_size: int = flag(0, "side of the teacher's input, if it is another one: it then sees the same view with "
                             "more or fewer pixels", low=0)
    allow_weak_teacher: bool = flag(False, "go on even if the teacher is near chance", free=True)
    topk: int = flag(0, "store only that many of the teacher's largest logits; 0: all of them", low=0)

    # The student and its loss
    student_weights: str = flag("none", "what it and its control start from: none (random), or as for the teacher")
    method: str = flag("kd", "what the student learns from its teacher (kd/losses.py has the formulas)", METHODS)
    standardise: bool = flag(False, "standardise each row of logits before the method compares them")
    label_smoothing: float = flag(0.0, "share of a label that goes to all classes; not the teacher's", low=0, high=1)
    select: str = flag("best", "keep the weights of the best epoch by validation, or of the last one",
                       ("best", "last"))

    # The optimizer, AdamW, of the teacher's fine-tuning as well
    batch_size: int = flag(8, "samples a step, over all ranks", low=2)
    schedule: str = flag("linear", "decay of the learning rate to zero", ("linear", "cosine"))
    warmup: float = flag(0.0, "share of the steps over which the rate rises", low=0, high=1)
    weight_decay: float = flag(0.0, "AdamW's decoupled weight decay", low=0)
    clip: float = flag(1.0, "largest norm of the gradient", above=0)

    # Speed. `--kernels off --compile off --amp off` runs the plain loop that train.py shows.
    device: str = flag("auto", "where to compute", ("auto", "cpu", "cuda", "mps"), free=True)
    amp: str = flag("auto", "mixed precision", ("auto", "off", "bf16", "fp16"))
    compile: str = flag("auto", "torch.compile the training (auto: on CUDA, from 20,000 steps on)",
                        ("auto", "on", "off"))
    kernels: str = flag("auto", "the fused kernels of kd/fast and a tuned allocator. auto: where they run; on: refuse "
                        "a machine where they do not; off: plain PyTorch", ("auto", "on", "off"))
    loss: str = flag("auto", "implementation of the loss. reference: `kd_loss` in train.py; fused: kd/fast; auto: "
                     "fused where it can be had", ("auto", "reference", "fused"))
    sync_bn: bool = flag(False, "on GPUs, BatchNorm over the batch of all ranks, not over each rank's share")

    @classmethod
    def of(cls, recipe: str = "demo", **flags: Any) -> "Config":
        """A recipe and flags, as on the command line: Config.of("demo", epochs=3). Raises BadInput."""
        return cli.build_config(cls, RECIPES, {**flags, "recipe": recipe})

    def size_of(self, role: str) -> int:
        """Side of the input of "teacher", "control" or "student", in pixels."""
        return self.teacher_size if role == "teacher" and self.teacher_size else self.size

    def folder(self) -> Path:
        """The folder of the run: --out, or the default one."""
        own_dataset = RECIPES[self.recipe].get("dataset", Config.dataset)
        return Path(self.out or cli.default_folder(self.recipe, self.dataset, self.config, own_dataset)).expanduser()

    @property
    def compares_features(self) -> bool:
        """Whether the student learns pooled features, so that its teacher has to give them."""
        return self.kd_weight > 0 and self.method in ON_FEATURES


RECIPES: dict[str, dict[str, Any]] = {
    # Some minutes on two CPU cores and nothing to download: both models start from random weights.
    "demo": dict(
        dataset="leaves", size=96, epochs=8, batch_size=16, lr=3e-3, schedule="cosine", warmup=0.1,
        weight_decay=0.02, teacher="resnet10t", teacher_weights="none", teacher_epochs=4,
        teacher_lr=3e-3, teacher_augment="flip", augment="flip", views=0),
    "tutorial": dict(),
    # "A good teacher is patient and consistent" (Beyer et al. 2022): no labels, only the teacher's
    # logits, on fresh views of every sample, for a long time.
    "best": dict(
        size=96, epochs=200, batch_size=32, lr=3e-3, schedule="cosine", warmup=0.1,
        weight_decay=0.02, teacher="tf_efficientnet_lite0", teacher_epochs=24, temperature=2.0,
        kd_weight=1.0, augment="crop", views=0),
    # Few labelled pictures and many others: a teacher from ImageNet weights answers for all of them.
    "few": dict(
        size=96, epochs=60, batch_size=32, lr=3e-3, schedule="cosine", warmup=0.1, weight_decay=0.02,
        teacher="tf_efficientnet_lite0", teacher_epochs=60, temperature=2.0, kd_weight=1.0,
        augment="crop-x", views=0, select="last"),
}


def check(cfg: Config) -> None:
    """Raise BadInput for flags that do not go with each other."""
    cli.check(cfg)
    if cfg.unlabelled and not cfg.kd_weight:
        raise BadInput("--unlabelled: nothing learns from pictures without labels at --kd-weight 0; give the teacher a "
                       "share, or leave it out")
    if cfg.kd_weight:
        _check_method(cfg)
    if cfg.loss == "fused" and cfg.kernels == "off":
        raise BadInput("--loss fused: needs the kernels that --kernels off forbids; use --loss auto")
    if cfg.loss == "fused" and cfg.label_smoothing:
        raise BadInput("--loss fused: knows no --label-smoothing; use --loss auto")


def _check_method(cfg: Config) -> None:
    method = cfg.method
    name = "--standardise" if cfg.standardise else f"--method {method}"
    if cfg.standardise and method not in STANDARDISABLE:
        raise BadInput(f"--standardise: does not go with --method {method}, only with kd, dkd and dist")
    if cfg.topk and (cfg.standardise or method not in ("kd", "hard")):
        raise BadInput(f"--topk {cfg.topk}: {name} needs all of the teacher's outputs; leave it out")
    if cfg.loss == "fused" and (cfg.standardise or method != "kd"):
        raise BadInput(f"--loss fused: {name} has no fused loss; use --loss auto")
    if method in NEED_LABELS and (cfg.labels or cfg.unlabelled):
        raise BadInput(f"--method {method}: needs the label of every picture, which --labels and --unlabelled do not "
                       f"give; use another method")
    if method in ("pkt", "rkd") and cfg.kd_weight == 1:
        raise BadInput(f"--kd-weight 1: --method {method} compares features only, so nothing would train the "
                       f"student's classifier; give less, such as 0.5")
    if method in ("pkt", "rkd") and cfg.batch_size // cli.ranks() < 3:
        raise BadInput(f"--batch-size {cfg.batch_size}: --method {method} compares the pictures of a rank's share, "
                       f"here {cfg.batch_size // cli.ranks()}; give enough for 3")


def parse_or_exit(doc: str | None) -> Config:
    """The settings of this process's command line. A mistake ends the process with one line and status 2."""
    return cli.parse_or_exit(Config, RECIPES, doc)
