"""`longtake doctor`: what this machine can do, and what to do about each problem."""

from dataclasses import asdict
from json import dumps

from longtake.cli.options import Switch
from longtake.cli.terminal import CHECK_FAILED, say


def doctor(json: Switch = False) -> int:
    """Try what this machine can do, and say what to do about each problem. Exits 1 if there is one.

    Args:
        json: Print one JSON object, with every number.
    """
    from longtake.doctor import examine

    findings = []
    for finding in examine(say):
        findings.append(finding)
        if not json:
            print(finding.in_words(), flush=True)
    problems = sum(finding.state == "problem" for finding in findings)
    if json:
        print(dumps({"healthy": not problems, "findings": [asdict(finding) for finding in findings]}, indent=2))
    elif not problems:
        print("all that longtake needs works here")
    return CHECK_FAILED if problems else 0
