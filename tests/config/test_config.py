import os
import signal
from pathlib import Path

import pytest
import yaml

from mas_embed import LOSSES, METHODS, Method, UserError, load_config
from mas_embed.config import constructor_parameters
from mas_embed.config.options import resolve_options
from mas_embed.losses import MINERS

CONFIGS = Path(__file__).parents[2] / "configs"
MINIMAL = {
    "name": "tiny",
    "data": "digits",
    "model": "small_conv",
    "loss": "TripletMarginLoss",
    "methods": ["finetune", "mas"],
}


@pytest.fixture
def write(tmp_path):
    def write(**changes):
        path = tmp_path / "config.yaml"
        values = {key: value for key, value in (MINIMAL | changes).items() if value is not None}
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def test_defaults_are_those_of_the_constructors(write):
    config = load_config(write())
    assert config.seeds == (0,)
    assert config.model.options == {"embedding_size": 32, "channels": 1, "width": 32, "is_normalized": True}
    assert config.methods[1].options == {
        "strength": 1.0,
        "output": "squared_norm",
        "accumulation": "sum",
        "decay": 0.9,
        "normalize": False,
        "decoupled": False,
        "embed": None,
    }
    assert config.loss.options["margin"] == 0.05
    assert config.training.optimizer.options["lr"] == 1e-3


def test_on_is_a_word_and_true_is_not(write, tmp_path):
    path = write(methods=["finetune"])
    text = path.read_text().replace(
        "- finetune", "- {name: mas, normalize: true, select: {strength: [1], on: validation}}"
    )
    path.write_text(text)
    config = load_config(path)
    assert config.methods[0].select.on == "validation"
    assert config.methods[0].options["normalize"] is True
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_what_is_written_resolved_is_read_as_the_same(path, tmp_path):
    needs_root = yaml.safe_load(path.read_text())["data"]["name"] == "facts"
    config = load_config(path, ["data.root=somewhere"] if needs_root else [])
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    resolved = load_config(tmp_path / "resolved.yaml")
    assert resolved.to_yaml() == config.to_yaml()
    assert resolved == config


def test_overrides(write):
    config = load_config(
        write(),
        [
            "methods.mas.strength=30",
            "training.epochs=3",
            "training.optimizer.lr=1e-4",
            "seeds=[4, 5]",
            "model.embedding_size=16",
            "training.miner=TripletMarginMiner",
        ],
    )
    assert config.methods[1].options["strength"] == 30
    assert config.training.epochs == 3
    assert config.training.optimizer.options["lr"] == 1e-4
    assert config.seeds == (4, 5)
    assert config.model.options["embedding_size"] == 16
    assert config.training.miner.name == "TripletMarginMiner"


def test_an_override_enters_a_method_by_its_label(write):
    methods = [{"name": "mas", "label": "weak"}, {"name": "mas", "label": "strong"}]
    config = load_config(write(methods=methods), ["methods.strong.strength=9"])
    assert [method.options["strength"] for method in config.methods] == [1.0, 9]
    assert [method.title for method in config.methods] == ["weak", "strong"]


def test_methods_of_a_method_are_resolved_like_any_other(write):
    combined = {"name": "combine", "methods": ["mas", {"name": "lwf", "strength": 3}]}
    config = load_config(write(methods=[combined]), ["methods.combine.methods.lwf.distillation=similarity"])
    mas, lwf = config.methods[0].options["methods"]
    assert mas["name"] == "mas" and mas["output"] == "squared_norm" and mas["strength"] == 1.0
    assert lwf == {"name": "lwf", "strength": 3, "distillation": "similarity", "embed": None}
    (write(methods=[combined]).with_name("resolved.yaml")).write_text(config.to_yaml())
    assert load_config(write().with_name("resolved.yaml")) == config


def test_the_loss_of_a_method_is_the_configs_or_its_own(write):
    assert "loss" not in load_config(write(methods=["ewc"])).methods[0].options
    config = load_config(write(methods=[{"name": "ewc", "loss": "MultiSimilarityLoss"}]))
    assert config.methods[0].options["loss"].items() >= {"name": "MultiSimilarityLoss", "alpha": 2, "beta": 50}.items()
    (write().with_name("resolved.yaml")).write_text(config.to_yaml())
    assert load_config(write().with_name("resolved.yaml")) == config
    for options, message in (
        ({"name": "mas", "loss": "MultiSimilarityLoss"}, "unknown option of methods.mas 'loss'"),
        ({"name": "ewc", "loss": "MultiLoss"}, "unknown loss 'MultiLoss'"),
        ({"name": "ewc", "loss": {"name": "NTXentLoss", "temprature": 1}}, r"methods.ewc.loss 'temprature': did you mean 'temperature'\?"),
        ({"name": "ewc", "loss": 3}, r"methods.ewc.loss must be made of components such as .*, got \[3\]"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            load_config(write(methods=[options]))


def test_what_the_run_provides_may_be_left_out(write):
    config = load_config(write(loss="ProxyAnchorLoss"))
    assert config.loss.options.items() >= {"margin": 0.1, "alpha": 32}.items()
    assert not config.loss.options.keys() & {"num_classes", "embedding_size"}
    assert load_config(write(loss={"name": "ProxyAnchorLoss", "num_classes": 10})).loss.options["num_classes"] == 10


@METHODS.register("named")
class Named(Method):
    """A method with an option that is called as a key of a config is."""

    def __init__(self, model, *, name: str = "its own", label: int = 3):
        super().__init__(model)
        self.options = (name, label)


def test_an_option_called_name_does_not_rename_its_component(write, tmp_path):
    config = load_config(
        write(methods=["named", {"name": "named", "label": "other", "options": {"name": "x", "label": 4}}])
    )
    assert [(method.name, method.title) for method in config.methods] == [("named", "named"), ("named", "other")]
    assert [method.options for method in config.methods] == [{"name": "its own", "label": 3}, {"name": "x", "label": 4}]
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "resolved.yaml") == config


def test_what_a_base_class_needs_may_be_given_by_the_subclass(write):
    assert load_config(write(loss={"name": "NTXentLoss"})).loss.options["temperature"] == 0.07


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "+1e-3", "1.e-3"])
def test_numbers_as_people_write_them(write, text):
    path = write()
    path.write_text(path.read_text() + f"training: {{optimizer: {{name: Adam, lr: {text}}}}}\n")
    assert load_config(path).training.optimizer.options["lr"] == 1e-3


def test_nested_components_of_a_loss(write):
    config = load_config(write(loss={"name": "TripletMarginLoss", "distance": {"name": "CosineSimilarity"}}))
    assert config.loss.options["distance"] == {"name": "CosineSimilarity"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainig": {}}, r"unknown key 'trainig': did you mean 'training'\?"),
        ({"training": {"epoch": 3}}, r"unknown key 'training.epoch': did you mean 'training.epochs'\?"),
        ({"training": {"epochs": "many"}}, "training.epochs='many' is not accepted: it must be a whole number"),
        ({"training": {"epochs": 0}}, "training.epochs=0 is not accepted: it must be a number greater than 0"),
        ({"training": {"sampler": {"name": "MPerClassSampler"}}}, "training.sampler needs the option 'm'"),
        ({"training": {"sampler": "TupleSampler"}}, "unknown sampler 'TupleSampler'"),
        ({"training": {"optimizer": "adam"}}, r"unknown optimizer 'adam': did you mean 'Adam'\?"),
        ({"training": {"miner": "TripletMiner"}}, r"unknown miner 'TripletMiner': did you mean 'TripletMarginMiner'\?"),
        ({"evaluation": {"distance": "manhattan"}}, "evaluation.distance='manhattan' is not accepted: it must be 'cosine', 'euclidean' or"),
        ({"evaluation": {"distanse": "cosine"}}, r"unknown option of evaluation 'distanse': did you mean 'distance'\?"),
        ({"evaluation": "retreival"}, r"unknown evaluator 'retreival': did you mean 'retrieval'\?"),
        ({"evaluation": {"every": 0}}, "evaluation.every=0 is not accepted"),
        ({"evaluation": {"primry_metric": "r_precision"}}, r"unknown option of evaluation 'primry_metric': did you mean 'primary_metric'\?"),
        ({"callbacks": ["step_lgo"]}, r"unknown callback 'step_lgo': did you mean 'step_log'\?"),
        ({"callbacks": [{"name": "step_log", "evry": 2}]}, r"unknown option of callbacks.step_log 'evry': did you mean 'every'\?"),
        ({"training": {"clip_norm": 0}}, "training.clip_norm=0 is not accepted"),
        ({"training": {"accumulate": 0}}, "training.accumulate=0 is not accepted"),
        ({"evaluation": 3}, "evaluation=3 is not accepted"),
        ({"importance": {"data": "sport"}}, r"unknown subset in importance.data 'sport': \(known: train\)"),
        ({"importance": {"dta": "train"}}, r"unknown key 'importance.dta': did you mean 'importance.data'\?"),
        ({"methods": [{"name": "mas", "importance": {"data": "sport"}}]}, "unknown subset in importance.data 'sport'"),
        ({"methods": [{"name": "mas", "importance": {"dta": 1}}]}, "unknown key 'methods.0.importance.dta': did you mean"),
        ({"subsets": {"sport": {"label": [1]}}}, r"unknown key 'subsets.sport.label': did you mean 'subsets.sport.labels'\?"),
        ({"subsets": {"sport": {"part": "test"}}}, "subsets.sport.part='test' is not accepted: it must be 'train', 'query' or 'gallery'"),
        ({"subsets": {"train": {}}}, "a subset cannot be called 'train'"),
        ({"training": {"scheduler": "StepLr"}}, r"unknown scheduler 'StepLr': did you mean 'StepLR'\?"),
        ({"training": {"scheduler": "StepLR"}}, "training.scheduler needs the option 'step_size'"),
        ({"data": "digit"}, r"unknown data set 'digit': did you mean 'digits'\?"),
        ({"data": None}, "the config needs 'data'"),
        ({"data": {"num_splits": 5}}, "the config needs 'data.name'"),
        ({"model": {"name": "small_conv", "embeding_size": 3}}, r"unknown option of model 'embeding_size': did you mean 'embedding_size'\?"),
        ({"model": {"name": "small_conv", "embedding_size": "big"}}, "model.embedding_size='big' is not accepted"),
        ({"model": "resnet"}, "unknown model 'resnet'"),
        ({"loss": "TripletLoss"}, "unknown loss 'TripletLoss': did you mean '.*TripletMarginLoss"),
        ({"loss": {"name": "TripletMarginLoss", "margin": "wide"}}, "loss.margin='wide' is not accepted"),
        ({"methods": ["mass"]}, r"unknown method 'mass': did you mean 'mas'\?"),
        ({"methods": []}, "methods=.* is not accepted"),
        ({"methods": ["combine"]}, r"methods.combine.methods must be made of components such as \[mas, .*\], got None"),
        ({"methods": [{"name": "combine", "methods": "mas"}]}, "methods.combine.methods must be made of .*, got 'mas'"),
        ({"methods": [{"name": "combine", "methods": ["mas", "lfw"]}]}, r"unknown method 'lfw': did you mean 'lwf'\?"),
        ({"methods": [{"name": "combine", "label": "both", "methods": [{"name": "lwf", "strenght": 3}, "mas"]}]},
         r"unknown option of methods.both.methods.lwf 'strenght': did you mean 'strength'\?"),
        ({"methods": [{"name": "combine", "methods": ["mas", {"name": "lwf", "strength": "much"}]}]},
         "methods.combine.methods.lwf.strength='much' is not accepted"),
        ({"methods": ["mas", "mas"]}, "two methods 'mas'; give each a label"),
        ({"methods": [{"name": "mas", "strenght": 3}]}, r"unknown option of methods.mas 'strenght': did you mean 'strength'\?"),
        ({"methods": [{"name": "mas", "strength": "strong"}]}, "methods.mas.strength='strong' is not accepted"),
        ({"methods": [{"name": "mas", "accumulation": "add"}]}, "methods.mas.accumulation='add' is not accepted: it must be 'sum', 'mean', 'decay' or 'max'"),
        ({"methods": [{"name": "mas", "label": "../up"}]}, "label='../up' is not accepted"),
        ({"methods": [{"name": "mas", "label": ".."}]}, "label='..' is not accepted"),
        ({"methods": [{"name": "mas", "select": {}}]}, r"select must give a list of values for at least one option"),
        ({"methods": [{"name": "mas", "select": {"strength": 3}}]}, r"select must give a list of values"),
        ({"methods": [{"name": "mas", "select": {"strenght": [3]}}]},
         r"unknown option of methods.mas.select 'strenght': did you mean 'strength'\?"),
        ({"methods": [{"name": "mas", "select": {"strength": [3, "much"]}}]}, "methods.mas.select.strength='much' is not accepted"),
        ({"methods": [{"name": "mas", "select": {"strength": [3], "seeds": [0]}}]}, "seeds must differ from the run's seeds"),
        ({"methods": [{"name": "mas", "select": {"strength": [3], "on": "test"}}]}, "on='test' is not accepted"),
        ({"methods": [{"name": "mas", "select": {"strength": [3]}}], "data": {"name": "digits", "held_out": "validation"}},
         "must be evaluated on another: data.held_out=test"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [True]}, "seeds.0=True is not accepted"),
        ({"seeds": [1.5]}, "seeds.0=1.5 is not accepted"),
        ({"training": {"epochs": True}}, "training.epochs=True is not accepted"),
        ({"data": {"name": "digits", "num_splits": True}}, "data.num_splits=True is not accepted"),
        ({"training": {"optimizer": {"name": "Adam", "lr": True}}}, "training.optimizer.lr=True is not accepted: it must be a number"),
        ({"loss": {"name": "TripletMarginLoss", "margin": float("nan")}}, "loss.margin=nan is not accepted"),
        ({"name": "a" * 300}, "is not accepted"),
        ({"seeds": [1, 1]}, "seeds must be different"),
        ({"seeds": 3}, "seeds=3 is not accepted"),
        ({"name": "a/b"}, "name='a/b' is not accepted"),
        ({"seeds": [-1]}, "seeds must be different numbers from 0 to 4294967295, got"),
        ({"seeds": ["1"]}, "seeds.0='1' is not accepted: it must be a whole number$"),
        ({"model": [1, 2]}, r"model=\[1, 2\] is not accepted: it must be a component such as `mas` or `{name: mas, strength: 3}`$"),
        ({"loss": 3}, "loss=3 is not accepted: it must be a component such as"),
        ({"loss": {"name": 3}}, "loss.name=3 is not accepted: it must be a text$"),
        ({"loss": {"name": "TripletMarginLoss", "options": [1]}}, "loss.options=.1. is not accepted: it must be a section of 'key: value' pairs$"),
        ({"loss": {"name": "TripletMarginLoss", 1: 2}}, "the key loss.options.1 is not accepted: it must be a text$"),
        ({1: 2}, "the key 1 is not accepted: it must be a text$"),
        ({"methods": "mas"}, "methods='mas' is not accepted: it must be a list$"),
        ({"methods": {"mas": 1}}, "methods={'mas': 1} is not accepted: it must be a list$"),
        ({"methods": [["mas"]]}, "methods.0=.'mas'. is not accepted: it must be a component such as"),
        ({"training": {"optimizer": {"name": "Adam", "betas": [1]}}}, "betas=.1. is not accepted: it must be a list of more entries$"),
        ({"training": {"clip_norm": True}}, "training.clip_norm=True is not accepted: it must be a number$"),
        ({"subsets": {"a": {"labels": [1.5]}}}, "subsets.a.labels.0=1.5 is not accepted: it must be a whole number or a text$"),
        ({"subsets": {"a": {"split": True}}}, "subsets.a.split=True is not accepted: it must be a text$"),
        ({"data": {"name": "folders", "root": "x", "splits": [1]}}, "data.splits=.1. is not accepted: every entry must be a text or a whole number$"),
        ({"data": {"name": "folders", "root": "x", "splits": True}}, "data.splits=True is not accepted: it must be a number, not true"),
        ({"data": {"name": "digits", "num_splits": 1.5}}, "data.num_splits=1.5 is not accepted: it must be a whole number$"),
        ({"data": {"name": "digits", "num_splits": "5"}}, "data.num_splits='5' is not accepted: it must be a number, not .* a text in quotes$"),
        ({"data": {"name": "torchvision", "root": "x", "dataset": "cifar10"}}, "dataset='cifar10' is not accepted: it must be .*'CIFAR10' or 'CIFAR100'$"),
        ({"evaluation": {"batch_size": 1.5}}, "evaluation.batch_size=1.5 is not accepted: it must be a whole number$"),
        ({"evaluation": {"batch_size": True}}, "evaluation.batch_size=True is not accepted"),
        ({"evaluation": {"batch_size": "64"}}, "evaluation.batch_size='64' is not accepted"),
        ({"evaluation": {"recall_at": ["1"]}}, "evaluation.recall_at=.'1'. is not accepted: it must be a number, not"),
        ({"methods": [{"name": "mas", "strength": float("inf")}]}, "methods.mas.strength=inf is not accepted: it must be a finite number$"),
        ({"methods": [{"name": "mas", "strength": 10**400}]}, "a number must lie between -1e308 and 1e308"),
        ({"methods": [{"name": "mas", "select": {"strength": [1], "seeds": [-5]}}]}, r"select.seeds must be different numbers from 0 to 4294967295, got \[-5\]"),
        ({"methods": [{"name": "mas", "select": {"select": [1, 2]}}]}, "unknown option of methods.mas.select 'select'"),
        ({"methods": [{"name": "mas", "select": {"label": ["a", "b"]}}]}, "unknown option of methods.mas.select 'label'"),
        ({"methods": [{"name": "mas", "select": {"importance": [{"data": "train"}]}}]}, "unknown option of methods.mas.select 'importance'"),
        ({"methods": [{"name": "mas", "select": {"strength": [[1]]}}]}, r"select.strength=\[1\] is not accepted: it must be a number$"),
        ({"methods": [{"name": "mas", "select": {"strength": []}}]}, "select must give a list of values"),
        ({"methods": [{"name": "mas", "select": {"strength": [1, 1.0]}}]}, r"select.strength must be a list of different values, got \[1, 1.0\]"),
        ({"methods": [{"name": "mas", "select": {"strength": list(range(1000)), "decay": [i / 1000 for i in range(1000)]}}]},
         "select must give at most 1,000 combinations of values, got 1,000,000"),
        ({"name": "\udcff"}, "name='.udcff' is not accepted: it must be a text without broken characters"),
        ({"subsets": {"\udcff": {}}}, "a key must not hold characters that cannot be printed"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(write, changes, message):
    path = write()
    path.write_text(yaml.safe_dump({k: v for k, v in (MINIMAL | changes).items() if v is not None}))
    with pytest.raises(UserError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epochs", "key.path=value"),
        ("=3", "key.path=value"),
        ("training.epoch=3", r"did you mean 'training.epochs'\?"),
        ("methods.ewc.strength=3", "unknown entry of methods 'ewc'"),
        ("methods=[", "not valid YAML"),
        ("name.first=3", "unknown key|not a section|name"),
    ],
)
def test_a_wrong_override_is_one_sentence(write, override, message):
    with pytest.raises(UserError, match=message):
        load_config(write(), [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: [", "is not valid YAML"),
        (b"- a\n- b\n", "must hold 'key: value' pairs"),
        (b"\xff\xfe\x00", "not a text file"),
        (b"name: a\nname: b\n", "is not valid YAML: the key 'name' is there twice"),
        (b"name: !!timestamp 2020-13-45\n", "is not valid YAML: the tag .*timestamp is not accepted"),
        (b"[" * 3000, "is not valid YAML"),
        (b"", "must hold 'key: value' pairs"),
        (b"name: !!python/object/apply:os.mkdir [ran]", "is not valid YAML"),
    ],
)
def test_what_is_no_config(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "c.yaml")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match="cannot read the config .*missing.yaml: No such file"):
        load_config(tmp_path / "missing.yaml")


def nested_anchors(first, value, count):
    """Every anchor holds the one before it several times."""
    return "".join([f"a0: &a0 {first}\n", *(f"a{i}: &a{i} {value.format(i - 1)}\n" for i in range(1, count))])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            nested_anchors("[x, x]", "[*a{0}, *a{0}, *a{0}, *a{0}, *a{0}, *a{0}, *a{0}, *a{0}]", 12),
            "more than 100,000 values",
        ),
        (nested_anchors("{k: 1}", "{{<<: [*a{0}, *a{0}, *a{0}]}}", 20), "more than 100,000 values"),
        (
            nested_anchors('"' + "x" * 100_000 + '"', "[*a0, *a0, *a0, *a0, *a{0}, *a{0}]", 10),
            "more than 100,000 values",
        ),
        (nested_anchors("1", "[*a{0}]", 400), "nested too deeply"),
        ("a: &a [*a]", "an anchor contains itself"),
        ("a: &a {b: {c: *a}}", "an anchor contains itself"),
        ("a: &a\n  ? *a\n  : 1", "an anchor contains itself"),
        ("a: " + "[" * 60 + "]" * 60, "nested too deeply"),
        ("? [1, 2]\n: 3", "a key must be a word, not a list or a section"),
        ("? {a: 1}\n: 3", "a key must be a word, not a list or a section"),
        ("a: !!binary aGk=", "the tag tag:yaml.org,2002:binary is not accepted"),
        ("a: !!set {b}", "the tag tag:yaml.org,2002:set is not accepted"),
        ("a: " + "9" * 5000, "a number must lie between -1e308 and 1e308"),
        ("a: 0x" + "f" * 5000, "a number must lie between -1e308 and 1e308"),
        ("#" * 300_000, r"it has 300,\d+ characters, more than 250,000"),
        ("a: b\0", "special characters are not allowed"),
    ],
)
def test_yaml_that_stands_for_too_much_is_refused_at_once(write, content, message):
    path = write()
    signal.alarm(20)
    for text in (content, f"{path.read_text()}{content}"):
        path.write_text(text)
        with pytest.raises(UserError, match=f"is not valid YAML: .*{message}") as caught:
            load_config(path)
        assert len(str(caught.value)) < 500
    with pytest.raises(UserError, match="is not valid YAML"):
        load_config(write(), [f"data={content}"])
    signal.alarm(0)


def test_many_keys_are_compared_in_no_time(write):
    path = write()
    path.write_text("".join(f"key{number}: 1\n" for number in range(10_000)))
    signal.alarm(20)
    with pytest.raises(UserError, match="the config needs"):
        load_config(path)
    signal.alarm(0)


def test_files_that_are_none_or_huge(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "huge.yaml").touch()
    os.truncate(tmp_path / "huge.yaml", 10**11)  # without taking room
    signal.alarm(20)
    for path, message in (
        (tmp_path / "pipe.yaml", "it is a pipe, a socket or a device, not a file"),
        ("/dev/zero", "it is a pipe, a socket or a device, not a file"),
        (tmp_path, "it is a folder, not a file"),
        ("a\0b", "embedded null byte"),
        (tmp_path / "huge.yaml", "has 100,000,000,000 bytes, more than"),
    ):
        with pytest.raises(UserError, match=f"the config .*{message}"):
            load_config(path)
    signal.alarm(0)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_another_encoding_is_refused(write, encoding):
    path = write()
    path.write_bytes((path.read_text() + "# \xe9\n").encode(encoding))
    with pytest.raises(UserError, match="not a text file|special characters are not allowed"):
        load_config(path)


def test_a_byte_order_mark_is_accepted(write):
    path = write()
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert load_config(path).name == "tiny"


@pytest.mark.parametrize(
    "text", ["\udcff", "\0", "\U0001f600", "x" * 20_000, "\x1b[31m", "2020-01-31", "on", "1e3"], ids=ascii
)
@pytest.mark.parametrize("values", [{"root": "{}"}, {"root": "x", "splits": ["{}"]}], ids=["root", "splits"])
def test_any_text_survives_being_written(write, tmp_path, text, values):
    filled = {key: [text] if isinstance(value, list) else value.format(text) for key, value in values.items()}
    path = write()
    path.write_text(yaml.safe_dump(MINIMAL | {"data": {"name": "folders", **filled}}, default_style='"'))
    config = load_config(path)
    assert config.data.options.items() >= filled.items()
    (tmp_path / "again.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml") == config


def test_an_override_does_not_change_what_shares_an_anchor(write):
    path = write()
    text = path.read_text().replace("- finetune\n- mas", "- &one {name: mas, label: a}\n- {<<: *one, label: b, select: &s {strength: [1]}}\n"
                                    "- {name: mas, label: c, select: *s}")  # fmt: skip
    path.write_text(text)
    config = load_config(path, ["methods.b.select.strength=[2, 3]"])
    assert [method.title for method in config.methods] == ["a", "b", "c"]
    assert [method.select.options["strength"] for method in config.methods[1:]] == [[2, 3], [1]]


def test_long_values_and_names_are_shortened(write):
    for changes in (
        {"model": ["x" * 9000]},
        {"loss": "x" * 9000},
        {"loss": {"name": "TripletMarginLoss", "x" * 900: 1}},
    ):
        with pytest.raises(UserError, match=r"x \.\.\. ?x?|x \.\.\.'") as caught:
            load_config(write(**changes))
        assert len(str(caught.value)) < 1000
    with pytest.raises(UserError, match=r"must look like key.path=value, got 'xx.* \.\.\. x") as caught:
        load_config(write(), ["x" * 9000])
    assert len(str(caught.value)) < 400


def test_what_a_class_passes_to_its_base_class_is_no_option():
    """BatchHardMiner sets both strategies itself; SubCenterArcFaceLoss takes the sizes out of its keywords."""
    parameters = constructor_parameters(MINERS["BatchHardMiner"])
    assert "pos_strategy" not in parameters and "allowed_pos_range" in parameters
    MINERS["BatchHardMiner"](**resolve_options("miner", MINERS["BatchHardMiner"], {}))
    with pytest.raises(UserError, match="unknown option of miner 'pos_strategy'"):
        resolve_options("miner", MINERS["BatchHardMiner"], {"pos_strategy": "easy"})
    assert {"num_classes", "embedding_size"} <= constructor_parameters(LOSSES["SubCenterArcFaceLoss"]).keys()
    assert "mat_based_loss" not in constructor_parameters(LOSSES["NTXentLoss"])
