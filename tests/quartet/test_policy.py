"""Policies: which rule decides what, why, and that a policy survives every way of writing it down."""

import importlib
import pickle
import re
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quartet.kernels.spec import POWERS, SIGMAS, QuantSpec
from quartet.lowering.recipe.op_classes import OP_GROUPS
from quartet.lowering.recipe.resolution import Choice, Resolution
from quartet.lowering.recipe.types import OP_CLASSES, ROLES, Delayed, Gemm, Operand, Recipe, Rotation, Saved
from quartet.options import KEYS
from quartet.policy import Policy, PolicyError, Rule, toml
from quartet.policy.toml import line_of
from quartet.recipes import recipes, register

catalogue = importlib.import_module("quartet.recipes")
CEIL = QuantSpec.parse("e2m1/32 e8m0 ceil nearest")
MINE = Recipe("mine", fprop=Gemm(Operand(CEIL), Operand(CEIL)), dgrad=Gemm(Operand(CEIL), Operand(CEIL, "saved")))
NAMES = {"Policy": Policy, "Recipe": Recipe, "Gemm": Gemm, "Operand": Operand, "Rotation": Rotation,
         "QuantSpec": QuantSpec, "Delayed": Delayed, "Saved": Saved}


@pytest.fixture(autouse=True)
def empty_registry(monkeypatch):
    monkeypatch.setattr(catalogue, "_registered", {})
    monkeypatch.setattr(catalogue, "_BUILT_IN", dict(catalogue._BUILT_IN))


def decide(policy, op="linear", fqn="layers.0.mlp.down_proj", m=64, n=128, k=256):
    return policy.resolve(op, fqn, m, n, k)


def names(resolution):
    return [resolution.recipe_for(role) and resolution.recipe_for(role).name for role in ROLES]


# --- the default -----------------------------------------------------------------------------------------------------

def test_default_policy_is_quartet_on_linear_layers():
    resolution = decide(Policy())
    recipe = recipes()["quartet"]
    assert [resolution.choice(role).gemm for role in ROLES] == [recipe.fprop, recipe.dgrad, recipe.wgrad]
    assert resolution.reason == "default recipe 'quartet'" and resolution.fprop.rule is None
    assert resolution.effective == replace(recipe, skip=())


@pytest.mark.parametrize("op", [c for c in OP_CLASSES if c != "linear"])
def test_default_leaves_skipped_op_classes_alone(op):
    resolution = decide(Policy(), op)
    assert not resolution.quantizes and names(resolution) == [None] * 3
    assert resolution.reason == f"recipe 'quartet' leaves {op} in high precision unless a rule names it"


def test_default_none_and_bf16_quantise_nothing():
    assert not decide(Policy(None)).quantizes
    assert decide(Policy(None)).reason == "default None: high precision"
    assert not decide(Policy("bf16")).quantizes
    assert decide(Policy("bf16")).reason == "default recipe 'bf16', which leaves everything in high precision"


def test_a_role_that_the_recipe_leaves_says_so():
    resolution = decide(Policy(MINE))
    assert resolution.dgrad.gemm == MINE.dgrad and resolution.wgrad.gemm is None
    assert resolution.reason.endswith("wgrad: default recipe 'mine', which leaves wgrad in high precision")


# --- which rule matches ----------------------------------------------------------------------------------------------

def test_the_last_match_wins():
    policy = Policy().on("*.down_proj", "bf16").on("layers.0.*", "quartet-paper").on("lm_head", "bf16")
    assert names(decide(policy)) == ["quartet-paper"] * 3 and decide(policy).fprop.rule == 1
    assert names(decide(policy, fqn="layers.1.mlp.down_proj")) == ["bf16"] * 3
    assert names(decide(policy, fqn="layers.1.mlp.up_proj")) == ["quartet"] * 3
    assert decide(policy).reason == "rule 1: on('layers.0.*', 'quartet-paper')"


def test_the_last_match_wins_per_role():
    policy = Policy().on("*.down_proj", None, role=("dgrad", "wgrad")).on("*", "quartet", role="dgrad")
    resolution = decide(policy)
    assert [resolution.choice(role).rule for role in ROLES] == [None, 1, 0]
    assert names(resolution) == ["quartet", "quartet", None]


@pytest.mark.parametrize("role, roles", [
    (None, ROLES), ("forward", ("fprop",)), ("fprop", ("fprop",)), (("wgrad", "forward"), ("fprop", "wgrad")),
    (["wgrad", "dgrad", "dgrad"], ("dgrad", "wgrad"))])
def test_roles_are_canonical(role, roles):
    assert Policy().on("*", None, role=role).rules[0].roles == roles


@pytest.mark.parametrize("pattern, fqn, matches", [
    ("*.down_proj", "layers.0.down_proj", True), ("*.down_proj", "down_proj", False),
    ("*.down_proj", "a.down_proj.b", False),
    ("layers.0.*", "layers.0.a.b", True), ("layers.0.*", "layers.00.a", False), ("layers.?.q", "layers.7.q", True),
    ("layers.[01].q", "layers.2.q", False), ("layers.0.q", "layers.0.q", True), ("layers.0", "layers.0.q", False),
    ("Layers.0.q", "layers.0.q", False), ("*", "anything", True), ("*", None, False), ("*", "", False)])
def test_globs(pattern, fqn, matches):
    assert (decide(Policy().on(pattern, None), fqn=fqn).fprop.rule == 0) is matches


def test_an_op_class_name_is_an_op_class_and_fqn_colon_is_the_module():
    by_class, by_name = Policy("bf16").on("lm_head", "quartet"), Policy("bf16").on("fqn:lm_head", "quartet")
    assert by_class.rules[0] == Rule("quartet", op="lm_head") and by_name.rules[0] == Rule("quartet", fqn="lm_head")
    assert decide(by_class, "lm_head", "output").quantizes and not decide(by_class, "linear", "lm_head").quantizes
    assert decide(by_name, "linear", "lm_head").quantizes and not decide(by_name, "lm_head", "output").quantizes
    assert by_name.rules[0].call() == "on('fqn:lm_head', 'quartet')"


def test_attention_is_a_group():
    policy = Policy().on("attention", "quartet")
    assert [op for op in OP_CLASSES if decide(policy, op).quantizes] == ["linear", "attention_qk", "attention_pv"]
    assert policy.rules == Policy().on(op="attention", recipe="quartet").rules
    assert all(op in OP_CLASSES for group in OP_GROUPS.values() for op in group)


def test_op_and_glob_both_have_to_match():
    policy = Policy("bf16").on("*.down_proj", "quartet", op="grouped")
    assert decide(policy, "grouped").quantizes
    assert not decide(policy, "linear").quantizes and not decide(policy, "grouped", "a.up_proj").quantizes


def test_shape_rules():
    policy = Policy("bf16").on("linear", "quartet", shape="k >= 4096 and n % 32 == 0")
    assert decide(policy, k=4096).quantizes
    assert not decide(policy, k=4095).quantizes and not decide(policy, k=4096, n=80).quantizes


def test_a_rule_without_a_name_respects_skip_and_a_named_one_does_not():
    unnamed = Policy("bf16").on(recipe="quartet")
    assert decide(unnamed).quantizes and not decide(unnamed, "lm_head", "lm_head").quantizes
    assert decide(Policy("bf16").on("lm_head", "quartet"), "lm_head", "lm_head").quantizes
    assert decide(Policy("bf16").on("*_head", "quartet"), "lm_head", "lm_head").quantizes


def test_an_unnamed_rule_for_high_precision_is_about_everything():
    assert decide(Policy("bf16").on(recipe=None), "lm_head").fprop.rule == 0


# --- saved codes -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fprop, said", [(None, "in high precision"), ("bf16", "in high precision"),
                                         ("quartet-paper", "quantised by 'quartet-paper'"), (MINE, "by 'mine'")])
def test_saved_operands_fall_back_to_the_original_without_their_fprop(fprop, said):
    resolution = decide(Policy().on("linear", fprop, role="forward"))
    quartet = recipes()["quartet"]
    for role in ("dgrad", "wgrad"):
        choice = resolution.choice(role)
        expected = getattr(quartet, role)
        assert choice.gemm == replace(expected, b=replace(expected.b, source="original"))
        assert choice.reason.startswith("default recipe 'quartet'; operand b from the original tensor")
        assert said in choice.reason
    assert resolution.effective.quantizes


def test_saved_operands_stay_where_another_recipe_has_the_same_fprop():
    twin = replace(recipes()["quartet"], name="twin", wgrad=None)
    resolution = decide(Policy("quartet").on("linear", twin, role=("forward", "wgrad")))
    assert resolution.dgrad.gemm.b.source == "saved" and resolution.dgrad.reason == "default recipe 'quartet'"
    assert resolution.effective.name == "twin+quartet"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["quartet", "quartet-paper", "bf16", None, MINE]),
                          st.sets(st.sampled_from(ROLES), min_size=1)), max_size=4))
def test_every_mix_gives_a_legal_recipe(rules):
    policy = Policy()
    for recipe, roles in rules:
        policy = policy.on("linear", recipe, role=tuple(roles))
    resolution = decide(policy)
    effective = resolution.effective
    for role in ROLES:
        assert getattr(effective, role) == resolution.choice(role).gemm
        last = [i for i, (_, roles) in enumerate(rules) if role in roles]
        assert resolution.choice(role).rule == (last[-1] if last else None)
    for role in ("dgrad", "wgrad"):
        gemm = resolution.choice(role).gemm
        if gemm is not None and gemm.b.source == "saved":
            assert resolution.recipe_for(role).fprop == resolution.fprop.gemm


def test_effective_keeps_what_the_forward_recipe_says():
    saver = replace(recipes()["quartet"], name="saver", recompute="gemm", keep_weights=False)
    effective = decide(Policy("bf16").on("linear", saver, role="forward")).effective
    assert (effective.name, effective.recompute, effective.keep_weights) == ("saver+bf16", "gemm", False)
    nothing = Choice(None, None, "no")
    assert Resolution(nothing, nothing, nothing).effective == Recipe("none", skip=())


def test_resolution_refuses_an_unknown_role():
    with pytest.raises(ValueError, match="no role 'backward'; possible: fprop, dgrad, wgrad"):
        decide(Policy()).choice("backward")


# --- validation ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kwargs, message", [
    (dict(pattern="*", recipe="quartte"), "unknown recipe 'quartte'; did you mean 'quartet'.*possible: quartet, qu"),
    (dict(op="lmhead", recipe=None), "unknown op class 'lmhead'; did you mean 'lm_head'.*linear.*attention"),
    (dict(pattern="*", recipe=None, role="wgrd"), "unknown role 'wgrd'; did you mean 'wgrad'.*fprop, dgrad, wgrad"),
    (dict(pattern="*", recipe=None, role=()), "role is one of"),
    (dict(pattern="*", recipe=None, role=3), "role is one of"),
    (dict(pattern="*", recipe=None, shape="k > q"), "column 5.*'q'"),
    (dict(pattern="", recipe=None), "a pattern is"),
    (dict(pattern="fqn:", recipe=None), "a pattern is"),
    (dict(pattern=7, recipe=None), "a pattern is"),
    (dict(pattern="linear", op="lm_head", recipe=None), "two op classes"),
    (dict(pattern="*"), r"on\('\*'\) needs a recipe: one of quartet, quartet-paper, bf16"),
    (dict(pattern="*", recipe=3), "a recipe is a name, a Recipe or None, not int 3"),
    (dict(pattern="*", recipe=replace(MINE, name="quartet")), "'quartet' is built in"),
])
def test_mistakes_are_refused_when_the_rule_is_made(kwargs, message):
    with pytest.raises(PolicyError, match=message):
        Policy().on(**kwargs)


def test_two_recipes_of_one_name_are_refused():
    with pytest.raises(PolicyError, match="two different recipes of this policy are called 'mine'"):
        Policy(MINE).on("*", replace(MINE, summary="other"))
    assert Policy(MINE).on("*", replace(MINE)).rules[0].recipe == MINE


def test_default_is_checked():
    with pytest.raises(PolicyError, match="did you mean 'bf16'"):
        Policy("bf61")
    with pytest.raises(PolicyError, match="made by Policy.on"):
        Policy("bf16", ("rule",))


def test_resolve_checks_the_op_class():
    with pytest.raises(PolicyError, match="did you mean 'linear'"):
        decide(Policy(), "liner")


def test_an_error_is_a_value_error():
    assert issubclass(PolicyError, ValueError)


# --- plain data ------------------------------------------------------------------------------------------------------

def test_frozen_and_persistent():
    policy = Policy()
    longer = policy.on("lm_head", None)
    assert policy.rules == () and len(longer.rules) == 1
    with pytest.raises(FrozenInstanceError):
        policy.default = "bf16"


def test_repr_is_python_and_str_is_short():
    policy = Policy(MINE).on("lm_head", None).on(op="linear", recipe="bf16", role="forward", shape="k>1")
    policy = policy.on(recipe=None)
    assert eval(repr(policy), NAMES) == policy
    assert str(policy) == ("Policy('mine').on('lm_head', None).on('linear', 'bf16', role='fprop', shape='k>1')"
                           ".on(recipe=None)")
    assert repr(Policy().on("a.*", "bf16")) == "Policy('quartet').on('a.*', 'bf16')"
    assert str(Policy(None)) == "Policy(None)"


def test_a_policy_keeps_the_recipe_it_was_built_with():
    register(MINE)
    policy = Policy("mine")
    digest = policy.digest()
    register(replace(MINE, dgrad=None))
    assert policy == Policy(MINE) and policy.digest() == digest
    assert Policy("mine") != policy and Policy("mine").digest() != digest


def test_digest_covers_the_content_of_a_built_in_recipe(monkeypatch):
    before = Policy("quartet").digest(), Policy("bf16").on("*", "quartet").digest(), Policy("bf16").digest()
    changed = replace(recipes()["quartet"], keep_weights=False)
    monkeypatch.setitem(catalogue._BUILT_IN, "quartet", changed)
    after = Policy("quartet").digest(), Policy("bf16").on("*", "quartet").digest(), Policy("bf16").digest()
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, False, True]


def test_digest_does_not_depend_on_how_the_policy_was_written():
    written = [Policy().on("lm_head", MINE, role=role, shape=shape) for role, shape in [
        (("wgrad", "forward"), "k > 1"), ({"fprop", "wgrad"}, " k  > 1"), (["wgrad", "fprop", "wgrad"], "k > 1 ")]]
    register(MINE)
    written.append(Policy(recipes()["quartet"]).on(op="lm_head", recipe="mine", role=("fprop", "wgrad"), shape="k > 1"))
    assert len({policy.digest() for policy in written}) == len(set(written)) == 1
    assert re.fullmatch("[0-9a-f]{32}", written[0].digest())


def test_digest_tells_every_part_apart():
    base = Policy().on("a", "bf16")
    others = [Policy(None).on("a", "bf16"), Policy().on("b", "bf16"), Policy().on("a", None), base.on("a", "bf16"),
              Policy().on("a", "bf16", role="wgrad"), Policy().on("a", "bf16", shape="k > 1"), Policy(),
              Policy().on("a", "bf16", op="linear"), Policy().on(op="linear", recipe="bf16"),
              Policy().on("fqn:linear", "bf16")]
    assert len({policy.digest() for policy in [base, *others]}) == len(others) + 1


def specs():
    quest = st.builds(QuantSpec, rule=st.just("quest"), sigma=st.sampled_from(SIGMAS), power=st.sampled_from(POWERS),
                      mask=st.booleans(), rounding=st.sampled_from(["nearest", "stochastic"]))
    plain = st.builds(QuantSpec, element=st.sampled_from(["e2m1", "e4m3"]), rule=st.sampled_from(["floor", "ceil"]),
                      block=st.sampled_from([16, 32, 128]))
    return st.one_of(quest, plain)


def gemms(source):
    fixed = st.lists(st.sampled_from([1, -1]), min_size=16, max_size=16).map(tuple)
    signs = st.one_of(st.sampled_from(["none", "random"]), fixed)
    rotation = st.one_of(st.none(), st.builds(Rotation, st.just(16), signs))
    quantised = st.builds(lambda a, b, s, r: Gemm(Operand(a), Operand(b, s), r), specs(), specs(), source, rotation)
    return st.one_of(quantised, st.builds(Gemm, st.just(Operand(None)), st.just(Operand(None)), rotation))


WORDS = st.text("aé\U0001f600\"\\\'.# -=", min_size=1, max_size=6).map("r{}".format)
TEXTS = st.text("aé\U0001f600\"\\\'\n\t\x00\x7f\u2028#", max_size=6)


def own_recipes():
    sources = st.sampled_from(["original", "saved"])
    return st.builds(
        Recipe, name=WORDS, summary=TEXTS, paper=TEXTS, fprop=gemms(st.just("original")),
        dgrad=st.one_of(st.none(), gemms(sources)),
        wgrad=st.one_of(st.none(), gemms(sources)), skip=st.lists(st.sampled_from(OP_CLASSES), max_size=3).map(tuple),
        keep_weights=st.booleans(), recompute=st.sampled_from(["none", "gemm"]))


@st.composite
def policies(draw):
    own = draw(own_recipes())
    any_recipe = st.sampled_from(["quartet", "quartet-paper", "bf16", None, own])
    policy = Policy(draw(any_recipe))
    for _ in range(draw(st.integers(0, 3))):
        pattern = draw(st.one_of(st.none(), st.sampled_from(["*.q", "fqn:linear", "fqn:fqn:x", 'a"b\\c', "é.*"])))
        policy = policy.on(pattern, draw(any_recipe), op=draw(st.sampled_from([None, "linear", "attention"])),
                           role=draw(st.sampled_from([None, "wgrad", ("fprop", "dgrad")])),
                           shape=draw(st.sampled_from([None, "k >= 4096 and n % 32 == 0"])))
    return policy


@settings(max_examples=25, deadline=None)
@given(policies())
def test_every_form_reads_back_equal(policy):
    for again in (eval(repr(policy), NAMES), Policy.from_toml(policy.to_toml()), Policy.from_dict(policy.to_dict()),
                  pickle.loads(pickle.dumps(policy))):
        assert again == policy and hash(again) == hash(policy) and again.digest() == policy.digest()


def test_every_field_of_a_recipe_has_a_place_in_toml():
    """A field of another type, or added to a GEMM, has to be added to toml.py too."""
    assert [f.name for f in fields(Gemm)] == ["a", "b", "rotation", "outer"]
    assert [f.name for f in fields(Operand)] == ["spec", "source"]
    assert [f.name for f in fields(Rotation)] == ["n", "signs"]
    assert set(toml.KINDS) == {f.name for f in fields(Recipe)} - {"name"}
    assert set(toml.KINDS.values()) == {str, bool, float, tuple, Gemm, Delayed, Saved}


# --- TOML ------------------------------------------------------------------------------------------------------------

EXAMPLE = '''\
# a comment
default = "quartet"

[[rule]]
op = "lm_head"
recipe = "none"

[[rule]]
pattern = "*.down_proj"
role = ["dgrad",
        "wgrad"]
shape = "k >= 4096"
recipe = "mine"

[recipe.mine]
skip = []
fprop = {a = "e2m1/32 e8m0 ceil nearest", b = "e2m1/32 e8m0 ceil nearest"}
dgrad = {a = "e2m1/32 e8m0 ceil nearest", b = "none"}
'''.replace('b = "none"', 'b = "e2m1/32 e8m0 ceil nearest", source = "saved", rotation = "H16 ' + "+-" * 8 + '"')


def test_toml_is_read(tmp_path):
    mine = Recipe("mine", skip=(), fprop=Gemm(Operand(CEIL), Operand(CEIL)),
                  dgrad=Gemm(Operand(CEIL), Operand(CEIL, "saved"), Rotation(16, (1, -1) * 8)))
    expected = Policy().on("lm_head", None).on("*.down_proj", mine, role=("dgrad", "wgrad"), shape="k >= 4096")
    path = tmp_path / "policy.toml"
    path.write_text(EXAMPLE, encoding="utf-8")
    for source in (EXAMPLE, EXAMPLE.replace("\n", "\r\n"), path, str(path)):
        assert Policy.from_toml(source) == expected
    assert Policy.coerce(str(path)) == Policy.coerce(path) == expected


def test_toml_is_written():
    policy = Policy().on("lm_head", None).on("*.down_proj", MINE, role=("dgrad", "wgrad"), shape="k >= 4096")
    assert policy.to_toml() == '''\
default = "quartet"

[[rule]]
op = "lm_head"
recipe = "none"

[[rule]]
pattern = "*.down_proj"
recipe = "mine"
role = ["dgrad", "wgrad"]
shape = "k >= 4096"

[recipe.mine]
fprop = {a = "e2m1/32 e8m0 ceil nearest", b = "e2m1/32 e8m0 ceil nearest"}
dgrad = {a = "e2m1/32 e8m0 ceil nearest", b = "e2m1/32 e8m0 ceil nearest", source = "saved"}
'''


def test_an_empty_text_is_the_default_policy():
    assert Policy.from_toml("") == Policy()


@pytest.mark.parametrize("old, new, line, message", [
    ('default = "quartet"', 'default = quartet', 2, "not valid TOML"),
    ('"saved", rotation', '"saved" rotation', 18, "not valid TOML"),
    ('default = "quartet"', 'defualt = "quartet"', 2, "unknown key in the policy: 'defualt'; did you mean 'default'"),
    ('default = "quartet"', 'default = "quartte"', 2, "did you mean 'quartet'"),
    ('default = "quartet"', 'default = 4', 2, "not int 4"),
    ('op = "lm_head"', 'opp = "lm_head"', 5, "unknown key in rule 0: 'opp'; did you mean 'op'"),
    ('op = "lm_head"', 'op = "lm_hed"', 5, "unknown op class 'lm_hed'; did you mean 'lm_head'"),
    ('recipe = "none"\n', '', 4, "needs a recipe"),
    ('pattern = "*.down_proj"', 'pattern = 3', 9, "a pattern is"),
    ('"wgrad"]', '"wgrd"]', 10, "did you mean 'wgrad'"),
    ('"k >= 4096"', '"k >= x"', 12, "column 6"),
    ('recipe = "mine"', 'recipe = "mien"', 13, "unknown recipe 'mien'"),
    ('skip = []', 'skpi = []', 16, "unknown key in recipe 'mine': 'skpi'; did you mean 'skip'"),
    ('skip = []', 'skip = ["lmhead"]', 16, "did you mean 'lm_head'"),
    ('skip = []', 'recompute = 3', 16, "recompute of recipe 'mine' is a str, not int 3"),
    ('skip = []', 'keep_weights = "no"', 16, "keep_weights of recipe 'mine' is a bool, not str 'no'"),
    ('skip = []', 'recompute = "some"', 15, "possible: 'none', 'gemm'"),
    ('[recipe.mine]', '[recipe.quartet]', 15, "'quartet' is built in"),
    ('source = "saved"', 'sauce = "saved"', 18, "key in dgrad of recipe 'mine': 'sauce'; did you mean 'source'"),
    ('source = "saved"', 'source = "savd"', 18, "operand source 'savd'"),
    ('H16', 'H17', 18, "Hadamard size 17"),
    ('H16 +', '16 +', 18, "cannot read rotation"),
    ('H16 +', 'H16 ++', 18, "16 values of ±1, got 17"),
    ('fprop = {a = "e2m1/32', 'fprop = {a = "e2m2/32', 17, "'e2m2' does not exist"),
    ('fprop = {a =', 'fprop = {x = 1, a =', 17, "unknown key in fprop"),
    ('fprop = {a = "e2m1/32 e8m0 ceil nearest",', 'fprop = {', 17, "has no operand 'a'"),
    ('fprop = {', 'fprop = 3 #', 17, "is a table with the keys a, b, source, rotation, outer, not int 3"),
])
def test_toml_mistakes_show_their_line(old, new, line, message):
    assert EXAMPLE.count(old) == 1 or old.startswith("recipe")
    with pytest.raises(PolicyError, match=message) as error:
        Policy.from_toml(EXAMPLE.replace(old, new, 1))
    assert f"line {line}" in str(error.value)


@pytest.mark.parametrize("text, message", [
    ("rule = 3", "line 1: 'rule' is a list of rules"), ("\nrule = [3]", "line 2: rule 0 is a table"),
    ("recipe = 'x'", "line 1: 'recipe' is a table of recipes of your own, and .* is the key 'default', not str 'x'"),
    ('\n\ndefault = "a', r"not valid TOML.*line 3"),
])
def test_toml_of_the_wrong_kind(text, message):
    with pytest.raises(PolicyError, match=message):
        Policy.from_toml(text)


def test_a_file_is_named_in_its_errors(tmp_path):
    path = tmp_path / "mine.toml"
    with pytest.raises(PolicyError, match="cannot read policy file.*mine.toml"):
        Policy.from_toml(str(path))
    path.write_text('\ndefault = "bf61"\n')
    with pytest.raises(PolicyError, match=r"mine\.toml, line 2: unknown recipe 'bf61'"):
        Policy.from_toml(path)
    path.write_bytes(b"\xff")
    with pytest.raises(PolicyError, match="cannot read policy file"):
        Policy.from_toml(path)


def test_line_of_finds_the_statement_and_falls_back_to_its_parent():
    assert line_of(EXAMPLE, ("rule", 1, "role")) == 10
    assert line_of(EXAMPLE, ("rule", 1, "op")) == 8
    assert line_of('a = """\n[[rule]]\n"""\nb = 1\n', ("b",)) == 4


# --- coerce ----------------------------------------------------------------------------------------------------------

def test_coerce():
    policy = Policy("bf16").on("*.q", "quartet")
    assert Policy.coerce(policy) is policy
    assert Policy.coerce("bf16") == Policy("bf16")
    assert Policy.coerce(MINE) == Policy(MINE)
    assert Policy.coerce({"default": "bf16", "rule": [{"pattern": "*.q", "recipe": "quartet"}]}) == policy
    with_objects = {"default": None, "rule": [{"op": "linear", "recipe": MINE}]}
    assert Policy.coerce(with_objects) == Policy(None).on("linear", MINE)
    register(MINE)
    assert Policy.coerce("mine") == Policy(MINE)


@pytest.mark.parametrize("value, message", [
    ("quartte", "unknown policy 'quartte'; did you mean 'quartet'.*path of a .toml file"),
    (3, "not int 3"), (None, "not NoneType"), ({"rules": []}, "key in the policy: 'rules'; did you mean 'rule'"),
    ("nowhere.toml", "cannot read policy file 'nowhere.toml'"),
])
def test_coerce_refuses(value, message):
    with pytest.raises(PolicyError, match=message):
        Policy.coerce(value)


# --- rules that match nothing ----------------------------------------------------------------------------------------

SITES = [("linear", f"model.layers.{i}.{name}", 64, 128, 256) for i in range(3)
         for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")] + [("lm_head", "lm_head", 64, 1000, 128)]


def unmatched(policy):
    return [(u.rule, str(u)) for u in policy.unmatched(iter(SITES))]


def test_rules_that_match_are_not_reported_even_when_a_later_one_wins():
    policy = Policy().on("*.down_proj", "bf16").on("linear", "quartet").on("lm_head", None).on("*", None)
    assert unmatched(policy) == []


def test_an_unmatched_glob_suggests_one_name_for_all_layers():
    (rule, text), = unmatched(Policy().on("lm_head", None).on("*.dwn_proj", "bf16"))
    assert rule == 1 and text.startswith("rule 1: on('*.dwn_proj', 'bf16') matches no matmul; nearest: "
                                         "'model.layers.0.mlp.down_proj'")
    assert "layers.1" not in text


def test_an_unmatched_exact_name_suggests_the_full_one():
    (_, text), = unmatched(Policy().on("layers.0.mlp.down_proj", "bf16"))
    assert "nearest: 'model.layers.0.mlp.down_proj'" in text


def test_nothing_near_suggests_nothing():
    assert unmatched(Policy().on("zzz", None)) == [(0, "rule 0: on('zzz', None) matches no matmul")]


def test_an_unmatched_shape_says_how_many_it_names():
    (_, text), = unmatched(Policy().on("*.down_proj", "bf16", shape="k >= 4096"))
    assert text.endswith("none of the 3 that it names satisfies 'k >= 4096'")


def test_an_unmatched_op_class_says_which_exist():
    (_, text), = unmatched(Policy().on("attention", "bf16"))
    assert text.endswith("op classes in the model: linear, lm_head")
    (_, text), = unmatched(Policy().on("*.down_proj", "bf16", op="conv"))
    assert text.endswith("no module like '*.down_proj' is of op class 'conv'")


# --- the documentation -----------------------------------------------------------------------------------------------

DOCS_FOLDER = Path(__file__).parents[2] / "docs"
DOCS = (DOCS_FOLDER / "policies.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOCS, flags=re.DOTALL)


def test_documented_toml_is_read_and_survives():
    (text,) = blocks("toml")
    policy = Policy.from_toml(text)
    assert policy.default.name == "plain-mxfp4" and len(policy.rules) == 2
    assert Policy.from_toml(policy.to_toml()) == policy


def test_documented_python_makes_what_it_says():
    first, second = blocks("python")
    names = dict(NAMES)
    exec(first[first.index("policy ="):first.index("model =")], names)
    assert [rule.call() for rule in names["policy"].rules] == [
        "on('*.down_proj', 'bf16')", "on('lm_head', None)",
        "on('linear', 'quartet-paper', role='wgrad', shape='k >= 4096 and n % 32 == 0')"]
    exec(second.replace("quartet.register", "register"), names | {"register": register})
    assert decide(Policy("plain-mxfp4")).quantizes


def test_every_built_in_recipe_and_op_class_is_documented():
    for name in (*OP_CLASSES, *OP_GROUPS, *KEYS):
        assert f"`{name}`" in DOCS, name
    for name in recipes():
        assert f"`{name}`" in (DOCS_FOLDER / "recipes.md").read_text(encoding="utf-8"), name


def test_rules_may_come_from_a_generator():
    rules = Policy("quartet").on("*.down", "fp8").on("lm_head", None).rules
    assert Policy("quartet", rules=(rule for rule in rules)).rules == rules
