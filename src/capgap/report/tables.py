"""The analysis as tables: laws by budget, with tokens, compared; hypotheses, roles, picks."""

from collections.abc import Mapping, Sequence

from rich.table import Table as TerminalTable

from capgap.law import Estimate, LawFit, LawScore, RoleOptimum, StudentOptimum, Test, TokenLaw, influence, scale_text
from capgap.report.analysis import Analysis, BudgetRoles, ConditionLaw
from capgap.report.picks import Pick
from capgap.report.rows import Row


def budget_rows(analysis: Analysis) -> list[Row]:
    """One row a budget: how many optima, and the law."""
    return [
        {
            "budget": budget.name,
            "runs": str(len(budget.records)),
            "optima inside": str(budget.interior),
            "censored": str(len(budget.law.optima) - budget.interior) if budget.law else "",
            "ratio T*/S": _ratio(budget.law),
            "slope": _words(budget.law.slope if budget.law else None),
            "exponent of S": _words(budget.law.exponent if budget.law else None),
            "p (exponent 1)": _p(budget.law.p_linear if budget.law else None),
        }
        for budget in analysis.budgets
    ]


def _ratio(law: LawFit | None) -> str:
    if law is None:
        return ""
    if law.ratio is not None:
        return _words(law.ratio)
    sides = {row.side for row in law.optima}
    edges = [row.optimum.teacher / row.student for row in law.optima]
    if len(sides) > 1:
        return "no law"
    return f"at most {max(edges):.2f}" if sides == {-1} else f"at least {min(edges):.2f}"


def token_rows(law: TokenLaw) -> list[Row]:
    """The law with tokens beside the student's scale: its numbers, and what each says."""
    middle = f"at {scale_text(law.student)} parameters and {law.per_parameter:.3g} tokens each"
    return [
        {"number": "ratio T*/S", "value": _words(law.ratio), "p": "", "reading": middle},
        {
            "number": "exponent of S",
            "value": _words(law.exponent),
            "p": _p(law.p_linear),
            "reading": "at equal tokens per parameter; p that it is 1",
        },
        {
            "number": "exponent of tokens per parameter",
            "value": _words(law.tokens),
            "p": _p(law.p_tokens),
            "reading": "p that it is 0, so that tokens do not matter",
        },
    ]


def score_rows(scores: Sequence[LawScore]) -> list[Row]:
    """Laws by their error on student scales left out."""
    return [
        {
            "law": score.law,
            "numbers fitted": str(score.parameters),
            "errs by a factor": f"{score.factor:.2f}",
            "optima foretold": str(score.optima),
            "bounds broken": f"{score.broken[0]} of {score.broken[1]}",
        }
        for score in scores
    ]


def influence_rows(law: LawFit) -> list[Row]:
    """The law without each student in turn."""
    return [
        {
            "without": scale_text(row.without),
            "slope": f"{row.slope:.3f}",
            "intercept": scale_text(row.intercept) if row.intercept >= 0 else f"−{scale_text(-row.intercept)}",
            "exponent": f"{row.exponent:.3f}",
        }
        for row in influence(law.optima)
    ]


def hypothesis_rows(tests: Sequence[tuple[str, Test]]) -> list[Row]:
    """Hypotheses, with statistic, p value and effect."""
    return [
        {
            "hypothesis": test.name,
            "of": of,
            "test": test.statistic,
            "p": _p(test.p),
            "effect": test.effect,
            "in detail": "; ".join(test.details),
        }
        for of, test in sorted(tests, key=lambda found: found[1].name[:2])
    ]


def condition_rows(conditions: Sequence[ConditionLaw], names: Mapping[float, str]) -> list[Row]:
    """One row a condition, budget and student: its optimum, beside the paper's way of the same student."""

    def named(row: StudentOptimum) -> str:
        return names.get(row.student, scale_text(row.student))

    found = []
    for law in conditions:
        # By name: a student's scale is a mean over its starts, and those may differ.
        plain = {named(row): row for row in law.paper.optima} if law.paper and law.same else {}
        for row in law.law.optima:
            other = plain.get(named(row))
            found.append(
                {
                    "condition": law.condition,
                    "budget": law.budget,
                    "student": named(row),
                    "T*/S": _optimum(row),
                    "loss there": f"{row.optimum.loss:.4f}",
                    "the paper's way": _optimum(other) if other else "",
                    "its loss": f"{other.optimum.loss:.4f}" if other else "",
                }
            )
    return found


def _optimum(row: StudentOptimum) -> str:
    return f"{_EDGES[row.side]}{row.optimum.teacher / row.student:.2f}"


_EDGES = {-1: "at most ", 0: "", 1: "at least "}


def role_rows(roles: Sequence[BudgetRoles]) -> list[Row]:
    """One row a budget and student: the best start, teacher, and model for both."""
    return [
        {
            "budget": budget.name,
            "student": scale_text(surface.student),
            "start P*/S": _role(surface.start, surface.student),
            "teacher T*/S": _role(surface.teacher, surface.student),
            "both one, /S": _role(surface.coupled, surface.student),
            "gained by two, nats": _words(surface.gain, ".4f"),
            "fit, rms nats": f"{surface.error:.4f}",
            "runs": str(surface.runs),
        }
        for budget in roles
        for surface in budget.surfaces
    ]


def pick_rows(picks: Sequence[Pick]) -> list[Row]:
    """What each rule picks for the largest student, and how far its loss is above the best."""
    return [
        {
            "budget": pick.budget,
            "student": pick.student,
            "roles": "apart" if pick.apart else "one model",
            "rule": pick.rule,
            "start": pick.start or "random",
            "teacher": pick.teacher,
            "loss": f"{pick.loss:.4f}",
            "above the best": f"{pick.excess:.2%}",
            "how": pick.note,
        }
        for pick in picks
    ]


def analysis_tables(analysis: Analysis, names: Mapping[float, str]) -> list[TerminalTable]:
    """What is there beside the laws, for the terminal: the law with tokens, laws compared, conditions, tests, roles.

    `names`: of the students by their scales.
    """
    tables = {
        "the law with tokens": token_rows(analysis.tokens) if analysis.tokens else [],
        "laws on student scales left out": score_rows(analysis.scores),
        "hypotheses (H3: a small p speaks against it)": [
            {head: value for head, value in row.items() if head != "in detail"}
            for row in hypothesis_rows(analysis.tests)
        ],
        "conditions beside the paper's way": condition_rows(analysis.conditions, names),
        "the roles apart": role_rows(analysis.roles),
    }
    found = []
    for title, rows in tables.items():
        if rows:
            table = TerminalTable(title=title)
            for head in rows[0]:
                table.add_column(head)
            for row in rows:
                table.add_row(*(value.replace("[", "\\[") for value in row.values()))
            found.append(table)
    return found


def _role(found: RoleOptimum, student: float) -> str:
    words = f"{_EDGES[found.side]}{found.scale / student:.2f}"
    if found.side or found.low is None or found.high is None:
        return words
    return f"{words} ({found.low / student:.2f} to {found.high / student:.2f})"


def _words(estimate: Estimate | None, form: str = ".2f") -> str:
    if estimate is None:
        return ""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:{form}}"
    return f"{estimate.value:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"


def _p(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.2g}"
