"""Family tables against the models their rows describe, and against published counts."""

import pytest
from transformers import AutoConfig

from capgap.cost import count_parameters
from capgap.errors import RecipeError
from capgap.plan import Family, family_names, load_family, narrowed
from capgap.recipe import check, parse_count

MEMBERS = [(f, m.name) for f in family_names() for m in load_family(f).members]

# Totals as the authors or the safetensors headers on the hub give them, shared weights counted once.
PUBLISHED = {
    "gpt2": (124_439_808, 354_823_168, 774_030_080, 1_557_611_200),
    "llama-2": (6_738_415_616, 13_015_864_320, 68_976_648_192),
    "llama-3": (1_235_814_400, 3_212_749_824, 8_030_261_248, 70_553_706_496, 405_853_388_800),
    "pythia": (
        70_426_624,
        162_322_944,
        405_334_016,
        1_011_781_632,
        1_414_647_808,
        2_775_208_960,
        6_857_302_016,
        11_846_072_320,
    ),
    "qwen3": (596_049_920, 1_720_574_976, 4_022_468_096, 8_190_735_360, 14_768_307_200, 32_762_123_264),
}
# Non-embedding counts of Qwen3 as its model cards round them, in billions.
QWEN3_NON_EMBEDDING = {"0.6b": 0.44, "1.7b": 1.4, "4b": 3.6, "8b": 6.95, "14b": 13.2, "32b": 31.2}


# Tokens of pretraining: Llama 2's paper, table 1; the model cards of Llama 3.1 and 3.2; Qwen3's report; 143000 steps of
# 1024 sequences of 2048 tokens for Pythia. GPT-2's are not published.
TRAINED_ON = {
    "gpt2": {None},
    "llama-2": {2 * 10**12},
    "llama-3": {9 * 10**12, 15 * 10**12},
    "pythia": {143_000 * 1024 * 2048},
    "qwen3": {36 * 10**12},
}


def test_the_families_are_those_that_were_checked():
    assert set(family_names()) == set(PUBLISHED)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_sizes_are_the_published_ones(name):
    family = load_family(name)
    assert family.name == name
    assert tuple(m.parameters for m in family.members) == PUBLISHED[name]


@pytest.mark.parametrize("name", sorted(TRAINED_ON))
def test_tokens_of_pretraining_are_the_published_ones(name):
    assert {m.trained_on for m in load_family(name).members} == TRAINED_ON[name]


@pytest.mark.parametrize("tokens", [0, -1, "many", 0.5])
def test_tokens_that_are_no_count_are_an_error(tokens):
    tree = load_family("gpt2").model_dump()
    tree["members"][0]["trained_on"] = tokens
    with pytest.raises(RecipeError, match=r"members\.0\.trained_on"):
        check(tree, Family, "gpt2.yaml")


@pytest.mark.parametrize(("family", "member"), MEMBERS)
def test_every_row_describes_the_model_it_counts(family, member):
    family = load_family(family)
    member = family.member(member)
    config = family.config_of(member)
    assert count_parameters(config).total == member.parameters
    known = AutoConfig.for_model(family.model_type)
    unread = [key for key in {**family.config, **member.config} if not hasattr(known, key)]
    assert unread == [], "fields that the configuration does not have"
    assert config.max_position_embeddings >= 1024


@pytest.mark.parametrize(("family", "member"), [m for m in MEMBERS if m[0] not in ("gpt2", "pythia")])
def test_names_say_the_rounded_size(family, member):
    exact = load_family(family).member(member).parameters
    assert exact == pytest.approx(parse_count(member), rel=0.25)


@pytest.mark.parametrize(("member", "billions"), QWEN3_NON_EMBEDDING.items())
def test_non_embedding_counts_of_qwen3(member, billions):
    family = load_family("qwen3")
    config = family.config_of(family.member(member))
    assert config.head_dim == 128
    assert count_parameters(config).non_embedding / 1e9 == pytest.approx(billions, rel=0.02)


def test_names_are_read_in_any_case_and_by_hub_id():
    family = load_family("Llama-2")
    for name in ("7B", " 7b", "meta-llama/llama-2-7b-hf"):
        assert family.member(name).hub == "meta-llama/Llama-2-7b-hf"


def test_unknown_names_list_the_known():
    with pytest.raises(RecipeError, match="'mistral' is not known; known are gpt2, llama-2, llama-3"):
        load_family("mistral")
    with pytest.raises(RecipeError, match="llama-2 has no member '34b'; its members are 7b, 13b, 70b"):
        load_family("llama-2").member("34b")


def test_a_key_that_nobody_reads_is_an_error():
    tree = load_family("gpt2").model_dump()
    tree["members"][0]["tokens"] = 9
    with pytest.raises(RecipeError, match=r"members\.0\.tokens: unknown key"):
        check(tree, Family, "gpt2.yaml")


def test_members_out_of_order_are_an_error():
    tree = load_family("gpt2").model_dump()
    tree["members"] = tree["members"][::-1]
    with pytest.raises(RecipeError, match="ascending order of parameters"):
        check(tree, Family, "gpt2.yaml")


@pytest.mark.parametrize(
    ("family", "member", "parameters"),
    [
        ("llama-2", "7b", 3_040_000_000),
        ("llama-3", "8b", 3_000_000_000),
        ("qwen3", "1.7b", 700_000_000),
        ("pythia", "1b", 400_000_000),
        ("gpt2", "large", 300_000_000),
    ],
)
def test_a_narrowed_configuration_has_about_the_size_asked_for(family, member, parameters):
    family = load_family(family)
    config = family.config_of(family.member(member))
    narrow = narrowed(config, parameters)
    assert count_parameters(narrow).total == pytest.approx(parameters, rel=0.01)
    assert narrow.num_hidden_layers == config.num_hidden_layers
    assert narrow.hidden_size < config.hidden_size
