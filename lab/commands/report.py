"""`./launch.sh report STUDY_FOLDER...`: regenerate the statistics and plots of studies, or of several pooled."""

from __future__ import annotations

from collections.abc import Sequence


def main(args: Sequence[str]) -> int:
    """FOLDER... [--pool]"""
    import tyro

    from lab.study.report.report import report

    tyro.cli(report, args=list(args), prog="./launch.sh report",
             config=(tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalRequiredArgs))
    return 0
