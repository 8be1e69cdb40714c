"""The documentation: links lead somewhere, code runs, commands exist, tables are true."""

import re
import shlex
import shutil
import subprocess
import textwrap
import threading
from pathlib import Path

import click
import pytest

import luo
from luo.cli import main
from luo.errors import errno_name
from luo.quirks import QUIRKS

from .test_mount import base, mounted, mounts  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benches/*.md")])
EXAMPLES = "\n".join(path.read_text() for path in sorted(ROOT.glob("examples/*.py")))

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page, language):
    """Return the code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def table(page, name):
    """Return the rows of the table between ``<!-- name -->`` and ``<!-- end -->``, cell by cell."""
    part = page.read_text().split(f"<!-- {name} -->\n", 1)[1].split("<!-- end -->", 1)[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in part.splitlines()]


def after_heading(page, heading):
    """Return the rows of the table below a heading."""
    part = page.read_text().split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [row for row in part.splitlines() if row.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


# ---- links, code, commands ----


def anchors(page):
    """Return the anchors that a page's headings make."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@each_page
def test_links_lead_to_files_and_headings(page):
    """Every relative link, pictures included."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        where = (page.parent / path) if path else page

        assert where.exists(), target
        assert not anchor or anchor in anchors(where), target


@each_page
def test_python_is_an_example_s_or_runs(page, tmp_path, monkeypatch):
    """A block stands in an example that the tests run, at any indentation, or runs here."""
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        indented = (textwrap.indent(block, " " * depth) for depth in (0, 4, 8, 12))
        if not any(text in EXAMPLES for text in indented):
            exec(compile(block, str(page), "exec"), {"__name__": "guide"})


def luo_commands(page):
    """Return what a page says of the command: lines of shell, and code in the text."""
    text = page.read_text()
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return [line for line in (*lines, *spans) if line.startswith("luo ")], spans


def all_options(command):
    """Return every option of a command and those below it."""
    below = command.commands.values() if isinstance(command, click.Group) else ()
    own = {opt for param in command.params for opt in (*param.opts, *param.secondary_opts)}
    return own.union(*map(all_options, below), {"-h", "--help"})


@each_page
def test_commands_and_options_exist(page):
    """Each ``luo …`` is a command with these options, each ``--option`` one of some command."""
    lines, spans = luo_commands(page)
    for line in lines:
        command = main
        for word in shlex.split(line.split(" | ")[0], comments=True)[1:]:
            if word == "--":  # behind it stands another command
                break
            if word.startswith("-") and word != "-":
                assert word.split("=")[0] in all_options(command), line
            elif isinstance(command, click.Group) and not word.isupper():
                for name in word.split("|"):
                    assert name in command.commands, line
                command = command.commands[word.split("|")[0]]
    for span in spans:
        if span.startswith("--"):
            assert re.match(r"--[a-z-]+", span)[0] in all_options(main), span


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@each_page
def test_shell_is_shell(page):
    """A block of shell can be read by one, and the files of this project that it names exist."""
    for block in blocks(page, "sh"):
        done = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)

        assert done.stderr == ""
        for name in re.findall(r"examples/\S+", block):
            assert (ROOT / name).exists()


@mounts
def test_update_in_the_admin_guide_goes_through(base):  # noqa: F811
    """Typed into a shell, in a mounted host, it goes from normal to normal, and loses nothing."""
    update = next(b for b in blocks(ROOT / "docs/admin-guide.md", "sh") if b.startswith("SYS="))
    with mounted(base, "--in-process"):
        done = subprocess.run(
            ["bash", "-e"],
            input=update.replace("SYS=host", f"SYS={base}/sys").replace("\ngrep", "\n! grep"),
            text=True,
            capture_output=True,
        )

    assert (done.stderr, done.stdout) == ("", "normal\nprepared\nupdated\nnormal\n")


# ---- tables ----


def kernel_in(state, **settings):
    """Return a running kernel in *state*, and what it needs to go on."""
    machine = luo.Machine("64MiB")
    kernel = luo.Kernel(machine, **settings).boot()
    if state != "NORMAL":
        kernel.kexec_load(luo.Kernel(machine, **settings))
        kernel.luo.prepare()
    return kernel.kexec() if state == "UPDATED" else kernel


@pytest.mark.parametrize("row", table(ROOT / "docs/lifecycle.md", "transitions")[2:])
def test_transitions_are_those_of_a_running_kernel(row):
    """The state that follows, the errno of the refusal, or an ordinary kexec."""
    state, *outcomes = row
    names = table(ROOT / "docs/lifecycle.md", "transitions")[0][1:]
    for event, expected in zip(names, outcomes, strict=True):
        with kernel_in(state) as kernel:
            try:
                done = getattr(kernel.luo, event.lower())()
                outcome = "ordinary kexec" if done is False else kernel.luo.state.name
            except luo.StateError as error:
                outcome = errno_name(error.errno)

            assert (event, outcome) == (event, expected)


def from_a_callback(what):
    """Do *what* with the kernel in a PREPARE callback; what it raises is raised here."""
    caught = []

    def prepare(context):
        try:
            what(context.kernel)
        except OSError as error:
            caught.append(error)

    with kernel_in("NORMAL", subsystems=[luo.Subsystem("inner", prepare=prepare)]) as kernel:
        kernel.luo.prepare()
    raise caught[0]


def killed(what):
    """Do *what* in a second thread while PREPARE runs, and kill it there."""
    caught = []

    def second(kernel):
        try:
            what(kernel)
        except OSError as error:
            caught.append(error)

    def prepare(context):
        thread = threading.Thread(target=second, args=[context.kernel], daemon=True)
        thread.start()
        while thread.is_alive():
            context.kernel.luo.kill(thread.ident)
            thread.join(0.001)

    kernel_in("NORMAL", subsystems=[luo.Subsystem("slow", prepare=prepare)]).luo.prepare()
    raise caught[0]


def twice(kernel, what):
    """Do *what* two times."""
    what(kernel)
    what(kernel)


def with_device(state, what, **driver):
    """Do *what* with a device whose driver is as said, in a kernel in *state*."""
    tree = luo.DeviceTree()
    tree.add("dev", None, None, "nic")
    nic = luo.Driver("nic", **{"ops": luo.LiveUpdateOps(), **driver})
    kernel = luo.Kernel(luo.Machine("64MiB", tree), drivers=[nic, luo.Driver("plain")]).boot()
    if state == "PREPARED":
        kernel.devices["dev"].requested = True
        kernel.luo.prepare()
    what(kernel.devices["dev"], tree)


def bound_anew(dev, tree):
    """Give a requested device a driver that does not support live update, and prepare."""
    dev.requested = True
    dev.unbind()
    dev.bind("plain")
    dev.kernel.luo.prepare()


def crowded(dev, tree):
    """Take all memory that there is, and prepare."""
    dev.requested = True
    dev.memory.alloc_folios(dev.memory.nr_free_pages(), 0)
    dev.kernel.luo.prepare()


def gone(dev, tree):
    """Write ``requested`` of a device that has been removed."""
    tree.remove("dev")
    dev.requested = True


REFUSED = {
    ("any event", "live update is off"): lambda: kernel_in("NORMAL", cmdline="").luo.prepare(),
    ("any event", "the state does not allow it"): lambda: kernel_in("NORMAL").luo.finish(),
    ("any event", "called from a callback of a running event"): lambda: from_a_callback(
        lambda kernel: kernel.luo.cancel()
    ),
    ("any event, `requested`", "killed while it waits for an event to end"): lambda: killed(
        lambda kernel: kernel.luo.cancel()
    ),
    ("`read_state()`", "killed while it waits"): lambda: killed(
        lambda kernel: kernel.luo.read_state().__enter__()
    ),
    ("`read_state()`, `register()`, `requested`", "from a callback"): lambda: from_a_callback(
        lambda kernel: kernel.luo.register(luo.Subsystem("late"))
    ),
    ("PREPARE", "KHO has been finalized by hand"): lambda: twice(
        kernel_in("NORMAL", kho_abi="kho-v5-series"),
        lambda kernel: kernel.luo.prepare() if kernel.kho.finalized else kernel.kho.finalize(),
    ),
    ("PREPARE", "a requested device has lost the driver that supported it"): lambda: with_device(
        "NORMAL", bound_anew
    ),
    ("PREPARE", "slots of a device above one folio of the largest order; a tree above `fdt_max`"):
        lambda: with_device("PREPARED", None, ops=luo.LiveUpdateOps(state_size=8 << 20)),
    ("PREPARE", "no memory"): lambda: with_device("NORMAL", crowded),
    ("REBOOT", "it has run, and neither jump nor cancel followed"): lambda: twice(
        kernel_in("PREPARED"), lambda kernel: kernel.luo.reboot()
    ),
    ("`kexec()`", "no kernel image is loaded"): lambda: kernel_in("NORMAL").kexec(),
    ("`register()`, `unregister()`", "in PREPARED"): lambda: kernel_in("PREPARED").luo.register(
        luo.Subsystem("late")
    ),
    ("`register()`", "the name is taken"): lambda: twice(
        kernel_in("NORMAL"), lambda kernel: kernel.luo.register(luo.Subsystem("one"))
    ),
    ("`unregister()`", "no such subsystem"): lambda: kernel_in("NORMAL").luo.unregister("none"),
    ("`requested` = 1", "the device, its driver or its bus does not support live update"):
        lambda: with_device("NORMAL", lambda dev, tree: setattr(dev, "requested", True), ops=None),
    ("`requested`", "another value than now, outside NORMAL"): lambda: with_device(
        "PREPARED", lambda dev, tree: setattr(dev, "requested", False)
    ),
    ("`requested`", "the device is gone"): lambda: with_device("NORMAL", gone),
    ("`reclaim()`", "the device was not preserved by the kernel before, or not in UPDATED"):
        lambda: with_device("PREPARED", lambda dev, tree: dev.reclaim()),
    ("`bind()`, `unbind()`", "outside NORMAL, or the device is preserved"): lambda: with_device(
        "PREPARED", lambda dev, tree: dev.unbind()
    ),
    ("`bind()`", "the kernel has no such driver"): lambda: with_device(
        "NORMAL", lambda dev, tree: dev.bind("none")
    ),
    ("`bind()`", "a driver is bound"): lambda: with_device(
        "NORMAL", lambda dev, tree: dev.bind("plain")
    ),
    ("`slot`, `kho_node`", "outside an update"): lambda: with_device(
        "NORMAL", lambda dev, tree: dev.kho_node
    ),
    ("anything", "the kernel is gone"): lambda: twice(
        kernel_in("NORMAL"), lambda kernel: kernel.shutdown()
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", after_heading(ROOT / "docs/lifecycle.md", "Refusals"))
def test_refusals_have_the_errno_that_is_written(row):
    """One row, one refusal."""
    call, when, name = row
    with pytest.raises(OSError) as refused:
        REFUSED[call, when]()

    assert errno_name(refused.value.errno) == name


def test_quirks_are_those_of_the_engine():
    """Every quirk has its row, in order, in the engine's own words."""
    rows = table(ROOT / "docs/faithfulness.md", "quirks")[2:]

    assert rows == [
        [str(q.number), f"`{q.name}`" + "*" * q.inline, q.severity, q.wrong, q.intended]
        for q in QUIRKS.values()
    ]
    assert len(rows) == 27
