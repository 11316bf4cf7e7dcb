"""Plans are values: JSON there and back, and readable."""

import json

import pytest
from pydantic import ValidationError
from zoo import ZOO, image

from nampruner.lineage import Lineage, lineage, remember
from nampruner.plan import PruningPlan, Repair, Size
from nampruner.pruning import plan_pruning


def plan(name: str = "unequal_split", ratio: float = 0.3) -> PruningPlan:
    return plan_pruning(ZOO[name].make(), image(), ratio=ratio, round_to=1, importance="random")


@pytest.mark.parametrize("name", ["unequal_split", "depthwise", "nam_attached", "tied_weights"])
def test_json_there_and_back(name: str) -> None:
    value = plan(name)
    again = PruningPlan.model_validate_json(value.model_dump_json())
    assert again == value
    assert again.removed.keys() == value.removed.keys()


def test_index_lists_are_sorted_unique_and_plain() -> None:
    for lists in (plan().removed, plan().masked):
        for dims in lists.values():
            for gone in dims.values():
                assert gone == sorted(set(gone))
                assert gone
                assert all(type(i) is int for i in gone)


def test_what_is_masked_is_part_of_what_is_removed() -> None:
    value = plan()
    assert value.masked
    for name, dims in value.masked.items():
        for dim, gone in dims.items():
            assert value.removed[name][dim] == gone


def test_a_repair_keeps_its_tuple() -> None:
    (repair,) = plan().repairs
    again = Repair.model_validate_json(repair.model_dump_json())
    assert again.before == (4, 12)
    assert isinstance(again.after, tuple)


def test_a_plan_reads_as_a_table() -> None:
    value = plan("chain")
    lines = str(value).splitlines()
    first = value.layers[0]
    assert "width" in lines[0]
    assert "threshold" in lines[0]
    row = next(line for line in lines if line.startswith("0 "))
    assert f"{first.width_before} → {first.width_after}" in row
    assert f"{first.threshold:.4g}" in row
    assert any("8" in line and "left alone: output of the network" in line for line in lines)
    assert "requested {'ratio': 0.3}, achieved ratio 0.2" in lines[-1]


def test_achieved_follows_from_the_sizes_and_widths() -> None:
    value = plan("chain")
    before = sum(row.width_before for row in value.layers)
    after = sum(row.width_after for row in value.layers)
    assert value.achieved.ratio == pytest.approx(1 - after / before)
    assert value.achieved.macs == pytest.approx(value.after.macs / value.before.macs)
    assert value.achieved.params == pytest.approx(value.after.params / value.before.params)


def test_values_are_frozen_and_know_their_fields() -> None:
    size = Size(params=1, macs=2)
    with pytest.raises(ValidationError):
        size.params = 3
    with pytest.raises(ValidationError):
        Size(params=1, macs=2, flops=4)


def test_an_unknown_format_is_refused() -> None:
    raw = json.loads(plan().model_dump_json())
    raw["format"] = 2
    with pytest.raises(ValidationError):
        PruningPlan.model_validate(raw)


def test_a_model_without_lineage_has_an_empty_one() -> None:
    model = ZOO["chain"].make()
    assert lineage(model) == Lineage()
    remember(model, source="timm:x", arguments={"num_classes": 3})
    remember(model, source="timm:y")
    assert lineage(model).source == "timm:y"
    assert lineage(model).arguments == {"num_classes": 3}
    assert "_nampruner_lineage" not in model.state_dict()
