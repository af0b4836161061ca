"""What other programs call the settings of this one.

The flags of HtFLlib and PFLlib by the names in their `system/main.py`, and the words of other federated
learning code. The remedies for unknown flags and the command `translate` come from these tables.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pfedmoe_mpi.errors import close_matches


@dataclass(frozen=True)
class Flag:
    """A flag of HtFLlib or PFLlib.

    `ours` are the settings that take its value, `note` says what else to know or what to do instead, and
    `elsewhere` names the methods it belongs to where none of them is here.
    """

    short: str
    long: str
    ours: tuple[str, ...] = ()
    note: str = ""
    elsewhere: str = ""

    @property
    def of_methods(self) -> tuple[str, ...]:
        """The settings of single methods that take its value."""
        return tuple(setting for (_, long), setting in OF_METHODS.items() if long == self.long)


HTFLLIB = "FedGen, FedKTL and FedL2G"
PFLLIB = "methods of PFLlib that are not here"

# A flag with neither `ours`, `note` nor `elsewhere` belongs to single methods: see OF_METHODS.
FLAGS = (
    Flag("algo", "algorithm", ("algorithm",), "Local is standalone"),
    Flag(
        "data",
        "dataset",
        ("data.name",),
        "with --data.source torchvision; AGNews: --data.source text; others: --data.path NAME.h5",
    ),
    Flag(
        "m",
        "model_family",
        ("model.pool",),
        "architectures by name, with --model.stem imagenet; the first one is --model.shared",
    ),
    Flag("nc", "num_clients", ("clients",)),
    Flag("jr", "join_ratio", ("participation",)),
    Flag("gr", "global_rounds", ("rounds",), "and --fedkd.ramp"),
    Flag("ls", "local_epochs", ("train.epochs",)),
    Flag("lbs", "batch_size", ("train.batch",), "and --fedgh.batch"),
    Flag("lr", "local_learning_rate", ("train.lr", "train.lr_shared")),
    Flag("eg", "eval_gap", ("eval.every",)),
    Flag("dev", "device", ("train.device",), "cuda is auto: theirs uses the CPU without a GPU, too"),
    Flag("fd", "feature_dim", ("model.dim",)),
    Flag("cdr", "client_drop_rate", ("faults.dropout",)),
    Flag("nnc", "num_new_clients", ("unseen.clients",), "and as many more --clients"),
    Flag("go", "goal", ("run.dir",)),
    Flag("t", "times", (), "run once for each --seed 0, 1, 2, …: `report` reads seeds as replicates"),
    Flag("ncl", "num_classes", (), "not needed: the number of classes is read from the data"),
    Flag("did", "device_id", (), "ranks share the visible GPUs; CUDA_VISIBLE_DEVICES hides some"),
    Flag("pv", "prev", (), "`pfedmoe-mpi restart RUN_DIR` continues a run"),
    Flag("sfn", "save_folder_name", (), "not needed: models are in the run's checkpoints"),
    Flag("ab", "auto_break", (), "no counterpart: all rounds are run; `report` names the best one"),
    Flag("tc", "top_cnt", (), "no counterpart, as auto_break"),
    Flag("ld", "learning_rate_decay", ("train.schedule",), "exponential; theirs reads any value as true"),
    Flag("ldg", "learning_rate_decay_gamma", ("train.gamma",)),
    Flag("rjr", "random_join_ratio", (), "no counterpart: the cohort's size is fixed"),
    Flag("fs", "few_shot", (), "no counterpart"),
    Flag("vs", "vocab_size", ("data.vocabulary",)),
    Flag("ml", "max_len", ("data.length",)),
    Flag("mfn", "models_folder_name", (), "no counterpart: clients start from random weights"),
    Flag(
        "tsr", "train_slow_rate", (), "no counterpart that sleeps; --faults.straggler simulates slow clients"
    ),
    Flag("ssr", "send_slow_rate", (), "no counterpart"),
    Flag("ts", "time_select", (), "no counterpart"),
    Flag(
        "tth", "time_threthold", (), "no counterpart in seconds; --faults.deadline counts mean client steps"
    ),
    Flag("lam", "lamda"),
    Flag("se", "server_epochs"),
    Flag("al", "alpha"),
    Flag("bt", "beta"),
    Flag("mlr", "mentee_learning_rate"),
    Flag("Ts", "T_start"),
    Flag("Te", "T_end"),
    Flag("slr", "server_learning_rate"),
    Flag("mart", "margin_threthold"),
    Flag("sfd", "sub_feature_dim"),
    Flag("mu", "mu"),
    Flag("pls", "plocal_epochs"),
    Flag("nd", "noise_dim", elsewhere=HTFLLIB),
    Flag("glr", "generator_learning_rate", elsewhere=HTFLLIB),
    Flag("hd", "hidden_dim", elsewhere=HTFLLIB),
    Flag("GPath", "generator_path", elsewhere=HTFLLIB),
    Flag("prompt", "stable_diffusion_prompt", elsewhere=HTFLLIB),
    Flag("sbs", "server_batch_size", elsewhere=HTFLLIB),
    Flag("gbs", "gen_batch_size", elsewhere=HTFLLIB),
    Flag("mdb", "meta_study_batches", elsewhere=HTFLLIB),
    Flag("mqb", "meta_quiz_batches", elsewhere=HTFLLIB),
    Flag("wu", "warm_up_rounds", elsewhere=HTFLLIB),
    Flag("dlg", "dlg_eval", (), "no counterpart: nobody attacks the sums"),
    Flag("dlgg", "dlg_gap", (), "no counterpart, as dlg_eval"),
    Flag("bnpc", "batch_num_per_client", (), "no counterpart, as dlg_eval"),
    Flag(
        "ften",
        "fine_tuning_epoch_new",
        (),
        "--unseen.tune, on --unseen.shots samples of every class; theirs takes all training samples",
    ),
    Flag("K", "K", elsewhere=PFLLIB),
    Flag("lrp", "p_learning_rate", elsewhere=PFLLIB),
    Flag("M", "M", elsewhere=PFLLIB),
    Flag("itk", "itk", elsewhere=PFLLIB),
    Flag("alk", "alphaK", elsewhere=PFLLIB),
    Flag("sg", "sigma", elsewhere=PFLLIB),
    Flag("tau", "tau", elsewhere=PFLLIB),
    Flag("fte", "fine_tuning_epochs", elsewhere=PFLLIB),
    Flag("dlr", "dr_learning_rate", elsewhere=PFLLIB),
    Flag("L", "L", elsewhere=PFLLIB),
    Flag("lf", "localize_feature_extractor", elsewhere=PFLLIB),
    Flag("et", "eta", elsewhere=PFLLIB),
    Flag("s", "rand_percent", elsewhere=PFLLIB),
    Flag("p", "layer_idx", elsewhere=PFLLIB),
    Flag("mo", "momentum", elsewhere=PFLLIB),
    Flag("klw", "kl_weight", elsewhere=PFLLIB),
    Flag("fsb", "first_stage_bound", elsewhere=PFLLIB),
    Flag("ca", "fedcross_alpha", elsewhere=PFLLIB),
    Flag("cmss", "collaberative_model_select_strategy", elsewhere=PFLLIB),
)
# (method here, long flag of theirs): the setting here.
OF_METHODS = {
    ("fedproto", "lamda"): "fedproto.weight",
    ("fd", "lamda"): "fd.weight",
    ("fedtgp", "lamda"): "fedtgp.weight",
    ("fedtgp", "server_epochs"): "fedtgp.epochs",
    ("fedtgp", "margin_threthold"): "fedtgp.margin",
    ("fedgh", "server_epochs"): "fedgh.epochs",
    ("fedgh", "server_learning_rate"): "fedgh.lr",
    ("scaffold", "server_learning_rate"): "scaffold.lr_server",
    ("fml", "alpha"): "fml.alpha",
    ("fml", "beta"): "fml.beta",
    ("fedkd", "mentee_learning_rate"): "train.lr_shared",
    ("fedkd", "T_start"): "fedkd.energy_start",
    ("fedkd", "T_end"): "fedkd.energy_end",
    ("fedmrl", "sub_feature_dim"): "fedmrl.dim",
    ("fedprox", "mu"): "fedprox.mu",
    ("ditto", "mu"): "ditto.weight",
    ("apfl", "alpha"): "apfl.alpha",
    ("fedrep", "plocal_epochs"): "fedrep.head_epochs",
}

_OTHERS = (
    ("algorithm", "algo alg method strategy aggregator fl_algorithm"),
    ("rounds", "round num_rounds n_rounds comm_round comm_rounds communication_rounds global_epochs"),
    ("clients", "n_clients num_users n_users num_parties n_parties client_num_in_total total_clients"),
    ("participation", "frac fraction fraction_fit client_fraction sample_ratio sample_fraction"),
    ("seed", "random_seed manual_seed rng_seed"),
    ("data.source data.name", "data dataset"),
    ("data.path", "data_dir datadir data_path data_root dataset_dir root"),
    ("data.size", "image_size img_size input_size resolution"),
    ("partition.kind", "partition split iid niid noniid non_iid distribution"),
    ("partition.alpha", "dirichlet dirichlet_alpha dir_alpha concentration"),
    ("partition.alpha fml.alpha", "alpha"),
    ("partition.alpha fml.beta", "beta"),
    ("partition.test_fraction", "test_size test_split test_ratio train_ratio"),
    ("partition.validation", "val_split val_fraction validation_split"),
    ("model.pool", "model models net arch architecture backbone"),
    ("model.dim", "embed_dim embedding_dim feat_dim"),
    ("model.weights", "pretrained pretrained_path weights init_weights"),
    ("model.train", "freeze freeze_backbone finetune peft"),
    ("model.keep_outputs", "cache_features precompute_features"),
    ("model.lora_rank", "lora_r"),
    ("train.epochs", "epochs epoch local_ep local_epoch num_epochs n_epochs"),
    ("train.batch", "batch batch_size batchsize bs local_bs train_batch_size"),
    ("train.steps", "steps local_steps local_iters local_iterations num_local_steps"),
    (
        "train.accumulate",
        "accumulation accumulation_steps gradient_accumulation_steps grad_accum",
    ),
    ("train.optimiser", "optimiser optimizer optim opt client_optimizer local_optimizer"),
    ("train.betas", "betas"),
    ("train.eps", "eps adam_epsilon"),
    ("train.lr train.lr_shared", "lr learning_rate client_lr local_lr"),
    ("train.momentum", "momentum"),
    ("train.weight_decay", "wd weight_decay reg l2"),
    ("train.clip", "grad_clip clip_grad clip_norm max_grad_norm"),
    ("train.schedule", "scheduler lr_scheduler lr_schedule"),
    ("train.gamma", "gamma lr_decay lr_gamma"),
    ("train.step_size", "step_size lr_step lr_step_size"),
    ("train.warmup", "warmup warmup_epochs warmup_rounds"),
    ("server.optimiser", "server_optimizer server_optimiser server_opt"),
    ("server.lr scaffold.lr_server fedgh.lr", "server_lr global_lr lr_server eta_g"),
    ("server.momentum", "server_momentum"),
    ("train.precision", "amp fp16 bf16"),
    ("train.device", "gpu gpu_id cuda use_cuda"),
    ("train.threads", "num_threads n_threads"),
    ("fedprox.mu", "mu prox_mu"),
    ("eval.every", "eval_every eval_interval eval_freq test_freq test_every frequency_of_the_test"),
    ("eval.batch", "test_batch_size eval_batch_size test_bs"),
    ("run.dir", "out output outdir output_dir save_dir save_path log_dir logdir result_dir"),
    ("run.checkpoint_every", "save_every save_freq save_interval checkpoint_freq checkpoint_interval"),
    ("run.tensorboard", "tb use_tensorboard"),
)
# Any other program's word, in lower case: the settings here.
WORDS = {word: tuple(settings.split()) for settings, words in _OTHERS for word in words.split()}
# Any other program's word without a setting here: what to do.
ADVICE = {
    "resume": "`pfedmoe-mpi restart RUN_DIR` continues a run",
    "num_workers": "not needed: every rank holds its clients' samples in memory",
}


def settings_for(word: str) -> tuple[str, ...]:
    """Return the settings that take the value of a flag named `word` elsewhere, the usual meaning first."""
    flag = _flag(word)
    for name in (word.lower(), flag.long.lower() if flag else ""):
        if name in WORDS:
            return WORDS[name]
    return (*flag.ours, *flag.of_methods) if flag else ()


def suggestions(word: str, names: Iterable[str]) -> list[str]:
    """Return those of the settings and flags `names` that `word` may stand for; maybe none."""
    names = list(names)
    return [name for name in settings_for(word) if name in names] or close_matches(word, names)


def advice(word: str) -> str:
    """Return what to do instead of a flag that has no setting here, or nothing."""
    flag = _flag(word)
    note = flag.note if flag and not settings_for(word) else ""
    return ADVICE.get(word.lower(), note)


def _flag(word: str) -> Flag | None:
    """Return the flag of HtFLlib or PFLlib by either of its names."""
    return next((flag for flag in FLAGS if word in {flag.short, flag.long}), None)
