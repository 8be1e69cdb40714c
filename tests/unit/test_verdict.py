"""Verdicts: each rule has an image that breaks it, and a right image breaks none.

The images are those that a real kernel is asked about in ``tests/guest/test_verdicts.py``, and some
more; what is expected of each is written beside it.
"""

import functools
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from guest.verdicts import CASES, DATA, FLBS, MIB, PAGE, RAM, SCRATCH, Case, Handmade, Memfd, orders

from luo import Kernel
from luo.cli import main
from luo.handover import Handover
from luo.image import Extent, Image
from luo.image.boot import virt_machine
from luo.image.rules import RULES, Outcome, Rule, Stage
from luo.image.verdict import Target, Verdict, judge
from luo.memfd import memfd_handler

ROOT = Path(__file__).resolve().parents[2]
PRINT_PAGE = """
import sys
sys.path.insert(0, ".")
import verdicts as v
print(v.filled(v.PAGE.read_text()), end="")
"""


def ids(problems) -> list[str]:
    """Rules of problems or notes."""
    return [problem.rule.id for problem in problems]


@functools.cache
def verdict_of(name: str) -> Verdict:
    """What luo says of a case."""
    return CASES[name].make().judged()


def good(**extra) -> Handmade:
    """A right handover, of which a test spoils something."""
    return Handmade(**extra)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_wrong_image_is_judged_by_its_rule(case: Case):
    """The first rule that strikes is the one that the case names; or it is a note."""
    verdict = verdict_of(case.name)

    if case.rule is None:
        assert [] == ids(verdict.problems) + ids(verdict.notes)
    elif RULES[case.rule].outcome is Outcome.TAKES:
        assert ([], True) == (ids(verdict.problems), case.rule in ids(verdict.notes))
    else:
        assert ids(verdict.problems)[0] == case.rule
        assert set(case.also) <= set(ids(verdict.problems) + ids(verdict.notes))


@pytest.mark.parametrize("name", CASES)
def test_a_real_kernel_did_what_the_verdict_says(name):
    """As it was recorded: of what is possible one happened."""
    record = json.loads((ROOT / "tests/guest/verdicts.json").read_text())

    assert record["seen"][name] in verdict_of(name).seen


def test_the_page_of_verdicts_is_up_to_date():
    """What ``make docs`` would write."""
    found = subprocess.run(
        [sys.executable, "-c", PRINT_PAGE],
        cwd=ROOT / "docs", capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert (ROOT / "docs/verdicts.md").read_text() == found.stdout


# ---- rules that the guest's kernel cannot show, or that take another target ----


def without_debug_vm(handmade: Handmade):
    """A verdict for a kernel without CONFIG_DEBUG_VM."""
    return judge(handmade.image(), Target(flbs=tuple(FLBS)))


def test_a_misaligned_index_is_rounded_down():
    """Without CONFIG_DEBUG_VM nothing stops: the data is at another place."""
    verdict = without_debug_vm(CASES["folio-with-a-misaligned-index"].make())

    assert (["folio.index"], ("wrong data",)) == (ids(verdict.problems), verdict.seen)


def test_a_folio_above_the_largest_order_is_taken():
    """Without CONFIG_DEBUG_VM there is not even a warning."""
    verdict = without_debug_vm(CASES["folio-of-order-11"].make())

    assert ([], ["folio.order"]) == (ids(verdict.problems), ids(verdict.notes))


def test_large_folios_without_huge_pages_are_undefined():
    """Order 0 does not need them."""
    target = Target(huge_pages=False, flbs=tuple(FLBS))

    verdict = judge(good(sessions=orders(1, 0)).image(), target)
    assert (["folio.huge-pages"], Outcome.UNDEFINED) == (ids(verdict.problems), verdict.outcome)
    assert [] == ids(judge(good(sessions=orders(0, 0)).image(), target).problems)


def test_another_page_size_ends_it():
    """Nothing else can be said then."""
    verdict = judge(good().image(), Target(page_size=65536))

    assert ["target.page-size"] == ids(verdict.problems)


def test_a_map_of_more_keys_than_pages_is_not_read_to_its_end():
    """A full leaf stands for 128 MiB; four of them do not fit into a quarter of that."""
    h = good(nbytes=512 * MIB)
    for i in range(4):
        h.builder.preserve(0x100000000 + i * 0x8000000, 0)
        path, _ = h.leaf(0x100000000 + i * 0x8000000, 0)
        h.poke(path[-1], b"\xff" * PAGE)

    verdict = judge(h.image())

    assert "map.unread" in ids(verdict.problems)


def test_a_good_image_of_ours_is_taken():
    """Sessions with memfds, as this library's kernel hands them over."""
    kernel = Kernel(
        virt_machine("256MiB"), arch="arm64", kho_abi="kho-v4", file_handlers=[memfd_handler()]
    ).boot()
    fds = [os.memfd_create(name) for name in "ab"]
    try:
        for i, fd in enumerate(fds):
            os.write(fd, os.urandom(50_000 * (i + 1)))
        with kernel.liveupdate.open() as node, node.create_session("s") as session:
            for token, fd in enumerate(fds):
                session.preserve(fd, token)
            with kernel.liveupdate.frozen():
                verdict = judge(Image.from_kernel(kernel))
    finally:
        for fd in fds:
            os.close(fd)

    assert (Outcome.TAKES, []) == (verdict.outcome, ids(verdict.problems))


def test_the_golden_dump_is_taken(shared: Path):
    """By its own kernel, which has the three FLBs; another one does not read them."""
    image = Image.load(shared / "golden" / "kho_v4_arm64")

    verdict = judge(image, Target(flbs=tuple(FLBS)))
    assert ([], ["subtree.unread"] * 2) == (ids(verdict.problems), ids(verdict.notes))
    verdict = judge(image)
    assert [] == ids(verdict.problems)
    assert ["flb.unread"] * 3 == ids(verdict.notes)[2:]


def test_the_golden_dump_on_a_smaller_machine(shared: Path):
    """Half the memory: what lies in the other half is where there is none."""
    image = Image.load(shared / "golden" / "kho_v4_arm64")

    verdict = judge(image, Target(memory=256 * MIB))

    assert (Outcome.PANICS, "scratch.array-memory") == (verdict.outcome, ids(verdict.problems)[0])
    assert "map.block" in ids(verdict.problems)


@pytest.mark.parametrize("abi", ["kho-v3", "kho-v2", "kho-v1"])
def test_other_generations_boot_cold(abi):
    """A name of another generation is refused before anything else is read."""
    h = good()
    h.finish(compatible=abi.encode() + b"\0")
    image = h.image()

    verdict = judge(Image(image.ram.ranges, image.handover, image.extents, abi=abi))

    assert (Outcome.COLD, "root.compatible") == (verdict.outcome, ids(verdict.problems)[0])


def test_problems_are_in_the_order_of_the_boot():
    """The first decides; the others would strike if it did not."""
    h = CASES["folio-not-in-the-map"].make()
    h.u64(h.at["session beta"] + 72, 9)
    h.poke(h.at["luo"], b"luo-v6\0\0")
    first = h.judged()
    h.poke(h.at["luo"], b"luo-v5\0\0")
    second = h.judged()

    assert (["luo.compatible"], ("panics",)) == (ids(first.problems), first.seen)
    assert ["session.count", "folio.key"] == ids(second.problems)
    assert ("EIO at open",) == second.seen
    stages = [p.rule.stage for p in second.problems]
    assert stages == sorted(stages)


def test_of_one_rule_the_first_are_listed_and_all_are_counted():
    """Of 100 files without their keys 20 are listed."""
    h = good(sessions={"s": [Memfd(token, 100) for token in range(100)]})
    for token in range(100):
        h.drop(h.at[f"s/{token} data 0"])

    problems = h.judged().problems

    assert 20 == len(problems)
    assert 100 == sum(problem.count for problem in problems)
    assert str(problems[-1]).endswith("(81 in all)")


# ---- scratch: the formula ----


@pytest.mark.parametrize(
    ("mib", "kib"), [(480, 9400), (512, 9460), (768, 14060), (1024, 18664), (4096, 8340)]
)
def test_scratch_is_small_where_the_kernel_found_it_small(mib, kib):
    """The least size that a real kernel booted with, found by bisection to 64 KiB."""

    def outcome(size):
        h = good(nbytes=mib * MIB, scratch=[(SCRATCH, size << 10)])
        return judge(h.image()).outcome

    assert outcome(kib - 64 - 128) is Outcome.PANICS
    assert outcome(kib) is not Outcome.PANICS
    assert outcome(kib + 2048 + 256) is Outcome.TAKES


# ---- the target ----


def test_target_is_read_from_pairs():
    """Each of them, and repeated ones."""
    target = Target.parse(
        [
            "huge-pages=no,kho=on,liveupdate=off,debug-vm=1",
            "memory=512MiB,page-size=16K",
            "flb=a,flb=b,handler=memfd-v2,handler=other",
            "kernel=0x40200000+6MiB,initrd=1073741824+0x1000,device-tree=0x48000000+64K",
            "reserve-mem=1M:4096:trace",
        ]
    )

    assert target == Target(
        page_size=16384,
        huge_pages=False,
        debug_vm=True,
        liveupdate=False,
        memory=512 * MIB,
        flbs=("a", "b"),
        handlers=("memfd-v2", "other"),
        kernel=(0x40200000, 6 * MIB),
        initrd=(1 << 30, 4096),
        device_tree_at=(0x48000000, 65536),
        reserve_mem=(("trace", MIB, 4096),),
    )
    assert Target.parse([]) == Target()


@pytest.mark.parametrize(
    "text",
    [
        "huge", "huge-pages=maybe", "memory=0", "memory=-1", "memory=5000", "memory=1EiB",
        "kernel=7", "kernel=x+1", "kernel=-1+1", "flb=", "reserve-mem=1M", "page-size=",
        "handler=" + "x" * 48, "page-size=4097", "reserve-mem=1M:3:a",
    ],
)  # fmt: skip
def test_target_that_is_none_is_named(text):
    """With what it was."""
    with pytest.raises(ValueError, match="target") as caught:
        Target.parse([text])

    assert text in str(caught.value)


def test_more_memory_than_the_image_is_behind_its_last_range():
    """And less is taken from the end."""
    image = Image([(0, 4 * MIB, 0), (8 * MIB, 4 * MIB, 1)], Handover(0, 0, 0, 0))

    assert [(0, 3 * MIB, 0)] == Target(memory=3 * MIB).ram(image).ranges
    assert [(0, 4 * MIB, 0), (8 * MIB, 1 * MIB, 1)] == Target(memory=5 * MIB).ram(image).ranges
    assert [(0, 4 * MIB, 0), (8 * MIB, 6 * MIB, 1)] == Target(memory=10 * MIB).ram(image).ranges


# ---- hostile bytes ----


@pytest.mark.parametrize("seed", range(60))
def test_random_words_are_judged(seed):
    """Any words anywhere: a verdict comes out, and soon."""
    rng = random.Random(seed)
    h = good()
    pages = [phys for phys in h.pages if phys < DATA]
    values = [0, 1, RAM, RAM + 512 * MIB, h.builder.root, h.builder.fdt, (1 << 64) - 1, 1 << 63]
    for _ in range(rng.choice([1, 3, 10])):
        at = rng.choice(pages) + 8 * rng.choice([0, 1, 2, 3, 4, 5, rng.randrange(512)])
        h.u64(at, rng.choice([*values, rng.getrandbits(64), rng.choice(pages)]))

    verdict = h.judged()

    json.dumps(verdict.document())
    assert verdict.seen


@pytest.mark.timeout(20)
def test_sessions_that_share_a_chain_are_judged_soon():
    """51 sessions with the same 10,000 blocks: each block is read for one of them."""
    h = good(sessions={f"s{i}": [] for i in range(51)})
    pages = [h.builder.blob(b"") for _ in range(10000)]
    for page, after in zip(pages, [*pages[1:], 0], strict=True):
        h.poke(page, struct.pack("<QQ48sQQ", after, 1, b"memfd-v2", 0, 1))
    for i in range(51):
        h.poke(h.at[f"session s{i}"] + 64, struct.pack("<QQ", pages[0], 10000))

    assert "page.shared" in ids(h.judged().problems)


def test_a_root_tree_anywhere_is_judged():
    """Numbers of the handover that make no sense."""
    image = good().image()
    for numbers in ((0, 0, 0, 0), (1 << 63,) * 4, ((1 << 64) - 1,) * 4, (RAM, 1, RAM, 1)):
        changed = Image(image.ram.ranges, Handover(*numbers), image.extents)

        assert judge(changed).outcome in (Outcome.COLD, Outcome.PANICS, Outcome.UNDEFINED)


def test_an_empty_image_is_judged():
    """Pages that are not there are named."""
    image = good().image()

    verdict = judge(Image(image.ram.ranges, image.handover))
    assert ["image.page"] == ids(verdict.problems)
    holes = [Extent(e.phys, e.nbytes, None) for e in image.extents]
    verdict = judge(Image(image.ram.ranges, image.handover, holes))
    assert "root.header" == ids(verdict.problems)[0]


# ---- the table ----


def test_every_rule_has_an_image():
    """Of the cases, or of a test here; each source names a function of the kernel."""
    struck = {
        rule
        for name in CASES
        for rule in ids(verdict_of(name).problems) + ids(verdict_of(name).notes)
    }
    here = {"folio.index", "folio.order", "folio.huge-pages", "target.page-size", "map.unread"}

    assert set(RULES) == struck | here


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rules_are_whole(rule: Rule):
    """An effect where the outcome does not say it, a stage in order, a source."""
    assert bool(rule.effect) == (rule.outcome in (Outcome.LATER, Outcome.UNDEFINED))
    assert rule.why
    assert rule.stage.label
    assert bool(rule.kernel) == (rule.id != "image.page")
    assert rule.outcome is not Outcome.COLD or rule.stage <= Stage.POPULATE


# ---- the command ----


def command(*arguments):
    """Run ``luo image verify --for linux-7.3``."""
    return CliRunner().invoke(main, ["image", "verify", "--for", "linux-7.3", *map(str, arguments)])


def test_command_says_what_happens(tmp_path):
    """Exit status 1, and the rule."""
    path = tmp_path / "a.khoimg"
    CASES["luo-v4"].make().image().save(path)

    result = command(path)

    assert 1 == result.exit_code
    assert "linux-7.3 panics" in result.output
    assert "luo.compatible" in result.output
    assert "early_initcall" in result.output


def test_command_of_a_good_image(tmp_path):
    """Exit status 0; with another target 1."""
    path = tmp_path / "a.khoimg"
    h = good()
    h.image().save(path)
    dtb = tmp_path / "dtb"
    dtb.write_bytes(h.device_tree())

    assert 0 == command(path, "--target", ",".join(f"flb={name}" for name in FLBS)).exit_code
    assert 0 == command(path, "--target", f"dtb={dtb}").exit_code
    result = command(path, "--target", "liveupdate=off")
    assert (1, True) == (result.exit_code, "ENOENT at open" in result.output)
    result = command(path, "--target", "flb=other", "--json")
    document = json.loads(result.output)
    assert ("linux-7.3", "fails later", ["warning"]) == (
        document["for"], document["outcome"], document["seen"],
    )  # fmt: skip
    assert "flb.missing" == document["problems"][0]["rule"]
    assert document["problems"][0]["kernel"].startswith("kernel/liveupdate/")


def test_command_of_wrong_usage(tmp_path):
    """Exit status 2 and one line."""
    path = tmp_path / "a.khoimg"
    good().image().save(path)

    for pairs in ("memory=no", "dtb=/nowhere", "colour=red"):
        result = command(path, "--target", pairs)
        assert (2, 1) == (result.exit_code, result.output.count("\n"))
    result = CliRunner().invoke(main, ["image", "verify", "--target", "kho=on", str(path)])
    assert (2, True) == (result.exit_code, "--for" in result.output)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_table_fits_the_screen(tmp_path, monkeypatch, width):
    """No line is longer than the screen is wide."""
    path = tmp_path / "a.khoimg"
    h = CASES["two-sessions-of-one-name"].make()
    h.poke(h.at["session alpha"], b"n" * 63)
    h.u64(h.at["session alpha"] + 72, 77)
    h.image().save(path)
    monkeypatch.setenv("COLUMNS", str(width))

    lines = command(path).output.splitlines()

    assert max(len(line.rstrip()) for line in lines) <= width
