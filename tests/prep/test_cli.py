"""The command line: exit codes, one sentence for each error that a user can fix, and the summaries."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from prep.build.summary import build_summary
from prep.cli import main
from prep.engines import SerialEngine
from prep.engines.progress import progress
from prep.help import EXAMPLES
from prep.inspect.validate import ValidateRequest, _inputs, _tasks
from schemas.annotation import ReasonCode
from schemas.manifest import Drift
from schemas.settings import MediaSettings
from storage.shard_set import read_manifest
from tests.prep.corpus import write_corpus
from train.settings.flags import make_parser


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))[0]


def test_validate_reports_every_bad_record_and_exits_with_1(corpus: Path, tmp_path: Path) -> None:
    result = run("validate", corpus, "--workers", 1, "--rejects", tmp_path / "rejects.jsonl")
    assert result.exit_code == 1
    assert "29 annotations: 26 valid, 3 rejected" in result.stdout
    assert f"{corpus}:2 (id bad-tag_mismatch)" in result.stdout
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [reject["problems"][0]["code"] for reject in rejects] == ["tag_mismatch", "media_missing", "bad_json"]
    assert rejects[0]["annotation"]["id"] == "bad-tag_mismatch"
    assert rejects[2]["annotation"] is None


def test_validate_writes_the_valid_records_back(corpus: Path, tmp_path: Path) -> None:
    run(
        "validate", corpus, "--workers", 1, "--fixed", tmp_path / "fixed.jsonl", "--rejects", tmp_path / "rejects.jsonl"
    )
    originals = corpus.read_text().splitlines()
    rejected = {json.loads(line)["line"] for line in (tmp_path / "rejects.jsonl").read_text().splitlines()}
    expected = [json.loads(line) for line_number, line in enumerate(originals, start=1) if line_number not in rejected]
    assert [json.loads(line) for line in (tmp_path / "fixed.jsonl").read_text().splitlines()] == expected
    result = run("validate", tmp_path / "fixed.jsonl", "--media-root", corpus.parent, "--workers", 1)
    assert result.exit_code == 0


def test_validate_deep_decodes_media_with_intact_headers(corpus: Path) -> None:
    result = run("validate", corpus, "--workers", 1, "--deep")
    assert "media_unreadable: 1" in result.stdout
    assert "29 annotations: 25 valid, 4 rejected" in result.stdout


def test_validate_exits_with_0_without_problems(tmp_path: Path) -> None:
    record = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    (tmp_path / "good.json").write_text(json.dumps([record]))
    result = run("validate", tmp_path / "good.json", "--workers", 1)
    assert result.exit_code == 0
    assert "1 annotation: 1 valid, 0 rejected" in result.stdout


def test_validate_reports_the_missing_video_of_the_real_data(qwen_demo: Path) -> None:
    result = run("validate", qwen_demo / "annotations.jsonl", "--workers", 1, "--boxes", "off")
    assert result.exit_code == 1
    assert "media_missing: 1" in result.stdout
    assert "annotations.jsonl:4: 'videos/v_7bUu05RIksU.mp4' does not exist" in result.stdout


def test_build_prints_the_balance_and_the_rejects_by_code(corpus: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    command = ["build", corpus, "--out", tmp_path / "out", "--model", tiny_checkpoint, "--max-length", 1200]
    result = run(*command, "--workers", 2)
    assert result.exit_code == 0, result.output
    assert "29 annotations = 24 packed + 5 rejected + 0 not sampled" in result.stdout
    assert "too_long: 1" in result.stdout
    assert read_manifest(tmp_path / "out").settings.max_length == 1200


def test_build_prints_its_times_on_request_only(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """The counts of a single annotation are in the singular."""
    record = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    (tmp_path / "good.json").write_text(json.dumps([record]))
    command = ["build", tmp_path / "good.json", "--out", tmp_path / "out", "--model", tiny_checkpoint, "--workers", 1]
    quiet, verbose, with_report = run(*command), run(*command, "-v"), run(*command, "--report")
    assert (quiet.exit_code, verbose.exit_code, with_report.exit_code) == (0, 0, 0)
    assert "1 annotation = 1 packed + 0 rejected" in quiet.stdout
    assert "\n1 bin of " in quiet.stdout
    assert "; 1 shard, " in quiet.stdout
    times = verbose.stdout.removeprefix(quiet.stdout)
    assert times.startswith("1 worker: scan ")
    assert "tokenize " in times
    assert times not in quiet.stdout
    path, size = with_report.stdout.splitlines(keepends=True)[-1].removeprefix("Report: ").rsplit(": ", 1)
    assert (Path(path), size.endswith(" kB\n")) == (tmp_path / "out" / "report.html", True)
    assert "<mark>b</mark>" in Path(path).read_text()


def test_programs_get_one_json_object_from_build_and_verify(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Progress and messages go to standard error."""
    record = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    (tmp_path / "é.json").write_text(json.dumps([record, {}]))
    out = tmp_path / "out"
    command = ["build", tmp_path / "é.json", "--out", out, "--model", tiny_checkpoint, "--workers", 1, "--json"]
    quiet, verbose = json.loads(run(*command).stdout), json.loads(run(*command, "-v", "--report").stdout)
    manifest = read_manifest(out)
    assert quiet["counts"] == msgspec.to_builtins(manifest.counts) and quiet["counts"]["num_rejected"] == 1
    assert quiet["statistics"] == msgspec.to_builtins(manifest.statistics) and quiet["fill"] == manifest.fill
    num_bytes = sum(path.stat().st_size for path in out.glob("bins-*.tar"))
    assert (quiet["out"], quiet["num_shards"], quiet["num_bytes"]) == (str(out), 1, num_bytes)
    assert (quiet["drift"], quiet["report"], verbose["report"]) == (None, None, str(out / "report.html"))
    assert (out / "report.html").is_file()
    assert set(verbose) - set(quiet) == {"num_workers", "stages_s", "samples_s"}

    intact = run("verify", out, "--workers", 1, "--json")
    counts = {"num_shards": 1, "num_bins": 1, "num_annotations": 2, "num_bytes": num_bytes}
    assert json.loads(intact.stdout) == {"folder": str(out), **counts, "drift": [], "findings": []}
    (out / "stray.tar").write_bytes(b"")
    (out / "bins-00000.tar").write_bytes(b"")
    damaged = run("verify", out, "--workers", 1, "--json")
    findings = json.loads(damaged.stdout)["findings"]
    assert (intact.exit_code, damaged.exit_code) == (0, 1)
    assert {"stray.tar", "bins-00000.tar"} <= {finding["where"].split()[0].rstrip(":,") for finding in findings}
    assert findings[0]["message"].startswith("stray.tar: the manifest does not list it")


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["build", "nope", "--out", "{out}", "--registry", "{registry}"], 2, "not registered"),
        (["build", "unset%50", "--out", "{out}", "--registry", "{registry}"], 2, "datasets.toml:2"),
        (["build", "{corpus}", "--out", "{out}", "--model", "./nowhere"], 2, "neither a folder nor a hub id"),
        (["build", "{corpus}", "--out", "{out}", "--model", "{model}", "--max-length", "3"], 2, "max_length is 3"),
        (
            ["build", "{corpus}", "--out", "{out}", "--model", "{model}", "--max-rejected", "5%"],
            1,
            "--max-rejected 5.00%",
        ),
        (["build", "{corpus}", "--out", "{out}", "--max-rejected", "x"], 2, "is not a share"),
        (["build", "{corpus}", "--out", "{out}", "--packer", "x"], 2, "bfd"),
        (["build", "{corpus}"], 2, "--out"),
        (["validate", "{out}/none.jsonl"], 2, "none.jsonl does not exist"),
        (["validate", "{out}/a.jsonl,{out}/b.jsonl"], 2, "paths are not joined by commas"),
        (["validate", "{corpus}", "--media-root", "{corpus}"], 2, "is a file, where a folder is expected"),
        (["verify", "{registry}"], 2, "is a file, where a folder is expected"),
        (["verify", "/dev/null"], 2, "/dev/null is not a folder. Give the folder or URL that"),
        (["validate", "{corpus}", "--media-root", "{out}/none"], 2, "is not a folder"),
        (["datasets", "--registry", "{out}/none.toml"], 2, "does not exist"),
    ],
)
def test_an_error_is_one_sentence_and_the_documented_exit_code(
    corpus: Path, tmp_path: Path, tiny_checkpoint: Path, arguments: list[str], code: int, part: str
) -> None:
    (tmp_path / "datasets.toml").write_text('[unset]\nannotation_path = ""\n')
    paths = {"out": tmp_path, "registry": tmp_path / "datasets.toml", "corpus": corpus, "model": tiny_checkpoint}
    result = run(
        *[argument.format(**paths) for argument in arguments],
        *(["--workers", 1] if arguments[0] != "datasets" else []),
    )
    assert result.exit_code == code
    assert part in result.stderr
    assert "Traceback" not in result.output


def test_datasets_lists_every_entry_with_its_state(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "datasets.toml").write_text(
        '[there]\nannotation_path = "a.json"\nmedia_root = "."\n[unset]\nannotation_path = ""\n'
    )
    result = run("datasets", "--registry", tmp_path / "datasets.toml")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith("there") and "ready" in lines[0]
    assert lines[1].startswith("unset") and "datasets.toml:5" in lines[1]
    there, unset = json.loads(run("datasets", "--registry", tmp_path / "datasets.toml", "--json").stdout)["datasets"]
    paths = {"files": [str(tmp_path / "a.json")], "media_root": str(tmp_path)}
    assert there == {"name": "there", "ready": True, "state": "ready", **paths}
    assert unset == {"name": "unset", "ready": False, "state": unset["state"], "files": [], "media_root": None}
    assert unset["state"] in lines[1]


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("https://host/shards", "web servers are read-only here"),
        ("http://host/shards", "web servers are read-only here"),
        ("memory://shards", "memory"),
    ],
)
def test_shards_are_not_written_to_read_only_or_temporary_stores(
    corpus: Path, tiny_checkpoint: Path, out: str, reason: str
) -> None:
    result = run("build", corpus, "--out", out, "--model", tiny_checkpoint, "--workers", 1)
    assert result.exit_code == 2
    assert f"--out {out}" in result.stderr
    assert reason in result.stderr


def test_rejects_that_fail_a_build_are_summed_by_code(corpus: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Samples that are too long, and those that the scan rejects, before anything is written."""
    command = ["build", corpus, "--out", tmp_path / "out", "--model", tiny_checkpoint, "--workers", 1]
    result = run(*command, "--max-length", 1200, "--max-rejected", "1%")
    assert result.exit_code == 1
    assert "4 of 29 annotations are rejected, more than --max-rejected 1.00%" in result.stderr
    for code in ("tag_mismatch 1", "media_missing 1", "bad_json 1", "too_long 1"):
        assert code in result.stderr


def test_a_share_too_small_for_one_annotation_says_so(corpus: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "datasets.toml").write_text(f'[few]\nannotation_path = "{corpus}"\nmedia_root = "{corpus.parent}"\n')
    command = ["build", "few%1", "--registry", tmp_path / "datasets.toml", "--out", tmp_path / "out"]
    result = run(*command, "--model", tiny_checkpoint, "--workers", 1)
    assert result.exit_code == 1
    assert "take a larger share" in result.stderr


def test_the_summary_has_a_line_for_each_dataset(corpus: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    table = f'annotation_path = "{corpus}"\nmedia_root = "{corpus.parent}"\n'
    (tmp_path / "datasets.toml").write_text(f"[half]\n{table}[all]\n{table}")
    command = ["build", "half%50,all", "--registry", tmp_path / "datasets.toml", "--out", tmp_path / "out"]
    result = run(*command, "--model", tiny_checkpoint, "--workers", 1)
    half, full = (line for line in result.stdout.splitlines() if line.startswith(("  half: ", "  all: ")))
    assert ", 15 not sampled; tokens per sample" in half
    assert ", 4 rejected; tokens per sample" in full
    look, train = (line.removeprefix("next: ") for line in result.stdout.splitlines()[-2:])
    shown = run(*shlex.split(look)[1:])
    assert (shown.exit_code, look.startswith("vlprep show ")) == (0, True), shown.output
    program, script, *flags = shlex.split(train)
    arguments, unknown = make_parser().parse_known_args(flags)
    assert (program, script, unknown) == ("deepspeed", "train/main.py", [])
    assert str(arguments.shards) == str(tmp_path / "out") and arguments.model_name_or_path == str(tiny_checkpoint)


@pytest.mark.parametrize("with_report", [False, True])
@pytest.mark.parametrize("has_rejects", [False, True])
@pytest.mark.parametrize("unused", [msgspec.UNSET, {"img": 3}])
@pytest.mark.parametrize("num_datasets", [1, 2, 3, 4, 30])
def test_the_summary_has_at_most_ten_lines(
    finished: Path, num_datasets: int, unused: dict[str, int] | msgspec.UnsetType, has_rejects: bool, with_report: bool
) -> None:
    """Nothing is left out but datasets, and these are counted."""
    manifest = read_manifest(finished)
    dataset = msgspec.structs.replace(manifest.statistics[0], unused_fields=unused)
    rejects = dict.fromkeys((code.value for code in ReasonCode), 1) if has_rejects else {}
    counts = msgspec.structs.replace(manifest.counts, num_rejected=len(rejects), rejects_by_code=rejects)
    drift = Drift(every=31, num_frames=1, mean_squared_error=1.0, psnr_db=48.1, lowest_psnr_db=48.1)
    datasets = [msgspec.structs.replace(dataset, dataset=f"d{index}") for index in range(num_datasets)]
    many = msgspec.structs.replace(manifest, statistics=datasets, counts=counts, drift=drift)
    lines = build_summary(many, finished, model="m", with_report=with_report).splitlines()
    assert len(lines) + with_report <= 10
    listed = [line for line in lines if line.startswith("  d")]
    others = [int(number) for line in lines for number in re.findall(r"… and (\d+) more dataset", line)]
    assert len(listed) + sum(others) == num_datasets and len(listed) >= 1
    assert sum(line.startswith("next: ") for line in lines) == 2 - with_report
    assert ("fields not used: " in "\n".join(lines)) == bool(unused)
    assert all(f"{code}: 1" in "\n".join(lines) for code in rejects)
    with_length = f"`vlprep validate --max-length {many.settings.max_length} --model m`"
    assert (with_length in "\n".join(lines)) == has_rejects, "validate counts tokens with a length only"
    whole = build_summary(many, finished, model="m", verbose=True, with_report=with_report)
    assert all(f"\n  d{index}: " in whole for index in range(num_datasets))


def test_a_closed_pipe_does_not_change_the_exit_code(corpus: Path) -> None:
    """``vlprep validate … | head -1``: the pipe is closed before anything is printed."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", "from prep.cli import main; main()", "validate", str(corpus), "--workers", "1"]
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert result.returncode == 1
    assert "vlprep:" not in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["vlprep", *main.commands])
def test_every_help_ends_with_examples_that_the_program_accepts(name: str) -> None:
    text = run("--help").stdout if name == "vlprep" else run(name, "--help").stdout
    examples = text.partition("\nExamples:\n")[2].splitlines()
    assert examples == [f"  {example}" for example in EXAMPLES[name]] and len(examples) >= 2
    with main.make_context("vlprep", ["datasets"]) as program:
        for example in examples:
            _, command, *words = itertools.takewhile(lambda word: word not in ("|", ">"), shlex.split(example))
            assert name in ("vlprep", command)
            main.commands[command].make_context(command, words, parent=program)


def test_the_list_of_commands_cuts_no_sentence() -> None:
    commands = run("--help").stdout.partition("\nCommands:\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in commands] == sorted(main.commands)
    assert not [line for line in commands if line.endswith("...")]


def test_a_shell_completes_commands_options_and_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = run("completion", "bash").stdout
    loaded = subprocess.run(["bash", "-c", f"{script}\ncomplete -p vlprep"], capture_output=True, text=True, check=True)
    assert "_vlprep_completion vlprep" in loaded.stdout
    assert "#compdef vlprep" in run("completion", "zsh").stdout
    assert "complete --no-files --command vlprep" in run("completion", "fish").stdout

    def completions(line: str) -> list[str]:
        words = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        return CliRunner().invoke(main, env={**words, "_VLPREP_COMPLETE": "bash_complete"}).stdout.splitlines()

    assert completions("vlprep ver") == ["plain,verify"]
    assert completions("vlprep build --video-s") == ["plain,--video-sampling"]
    assert completions("vlprep completion z") == ["plain,zsh"]
    assert completions("vlprep build m") == ["file,m"]
    Path("datasets.toml").write_text("[mp_doc]\n[clevr]\n")
    Path("mine.toml").write_text("[mine]\n")
    for command in ("build", "validate"):
        assert completions(f"vlprep {command} m") == ["file,m", "plain,mp_doc"]
        assert completions(f"vlprep {command} --registry mine.toml m") == ["file,m", "plain,mine"]
    assert completions("vlprep report shards --registry mine.toml --datasets m") == ["file,m", "plain,mine"]
    Path("datasets.toml").write_text("[mp_doc")
    assert completions("vlprep build m") == ["file,m"]


def test_progress_is_rare_plain_lines_in_a_log_and_a_live_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with progress("scan", 10, "record") as in_log:
        assert (in_log.mininterval, in_log.miniters, in_log.monitor) == (30, 1, None)
        in_log.update(4)
        assert log.getvalue() == "", "of a step that is soon over"
        in_log.start_t -= 60
        in_log.last_print_t -= 60
        in_log.update(1)
    first, last, rest = log.getvalue().split("\n")
    assert re.fullmatch(r"scan:  50% 5/10 \[01:0\d<01:0\d, .*record.*\]", first)
    assert last.startswith("scan:  50% 5/10 [01:0")
    assert rest == "", "and no carriage return"
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("scan", 10, "record") as on_terminal:
        assert (on_terminal.mininterval, on_terminal.miniters, on_terminal.monitor) == (0.1, 1, None)
    assert terminal.getvalue().startswith("\rscan: ")
    with progress("index", 0, "file") as nothing:
        assert nothing.disable


def test_validate_checks_a_registered_dataset_with_its_own_root_and_settings(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "all.jsonl").write_bytes(corpus.read_bytes())
    (tmp_path / "datasets.toml").write_text(
        f'[mine]\nannotation_path = "lists/*.jsonl"\nmedia_root = "{corpus.parent}"\n'
        "[small]\nannotation_path = 'lists/all.jsonl'\n"
        f'media_root = "{corpus.parent}"\n[small.media]\nmax_source_bytes = 1\n'
    )
    options = ["--registry", tmp_path / "datasets.toml", "--workers", 1]
    assert "29 annotations: 26 valid, 3 rejected" in run("validate", "mine", *options).stdout
    assert "media_too_large" in run("validate", "small", *options).stdout
    for option in ("--fixed", "--rejects"):
        result = run("validate", "small", *options, option, tmp_path / "lists" / "all.jsonl")
        assert (result.exit_code, "would overwrite" in result.stderr) == (2, True)
    result = run("validate", "nope", *options)
    assert (result.exit_code, "not registered" in result.stderr) == (2, True)


def test_validate_checks_every_record_of_a_mixture_whatever_its_shares(corpus: Path, tmp_path: Path) -> None:
    table = f'annotation_path = "{corpus}"\nmedia_root = "{corpus.parent}"\n'
    (tmp_path / "datasets.toml").write_text(f"[a]\n{table}[b]\n{table}")
    for arguments in (["a%50,b"], ["a", f"{corpus}%50"], [corpus, f"{corpus}%200"]):
        result = run("validate", *arguments, "--registry", tmp_path / "datasets.toml", "--workers", 1)
        assert "58 annotations: 52 valid, 6 rejected" in result.stdout


def test_validate_distinguishes_a_dataset_from_a_folder_of_the_same_name(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = f'annotation_path = "{corpus}"\nmedia_root = "{corpus.parent}"\n'
    (tmp_path / "datasets.toml").write_text(f"[mine]\n{table}")
    (tmp_path / "mine").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "29 annotations: 26 valid, 3 rejected" in run("validate", "mine", "--workers", 1).stdout
    for wrong, part in [
        ("other", "(registered: mine), and as an annotation file it is an empty folder; expected JSON, JSONL or"),
        (tmp_path / "mine", f"annotation file {tmp_path / 'mine'} is an empty folder; expected JSON, JSONL or"),
    ]:
        result = run("validate", wrong, "--workers", 1)
        assert (result.exit_code, part in result.stderr) == (2, True)


def test_a_file_that_is_named_twice_is_checked_twice_with_separate_scratch_folders(
    corpus: Path, tmp_path: Path
) -> None:
    request = ValidateRequest(
        files=(corpus, corpus),
        media_root=None,
        deep=False,
        rejects=None,
        fixed=None,
        reserved="reject",
        media=MediaSettings(),
    )
    inputs = [item for named in request.files for item in _inputs(request, named)]
    tasks = list(_tasks(request, inputs, SerialEngine(), tmp_path))
    assert [task.file for task in tasks] == [corpus, corpus]
    assert len({task.scratch for task in tasks}) == 2
