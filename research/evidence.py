# SPDX-License-Identifier: Apache-2.0
"""The evidence: does guided cross-attention work as claimed? On grounded scenes of photographs, with several seeds.

    make evidence                                      # or: python -m research.evidence
    make evidence ARGS="--arms guided --seeds 0"

Each arm of `arms.yaml` is trained with each seed by the recipe `evidence.yaml`, and examined on scenes of new backgrounds and on
scenes of new classes: the image beside the text (Llava), cross-attention without guidance, with guidance by exact masks, and with
guidance by a teacher's masks (GrabCut, from boxes). Stop it, even kill it: the same command resumes.
"""

import argparse
import json

from research.parts import choose, console, parse_arguments, prepare, run_command
from research.report import check_claims, write_report
from research.runs import ARMS, run_all


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m research.evidence", description="Train and examine the arms of the evidence."
    )
    parser.add_argument("--arms", help=f"separated by commas; by default {','.join(ARMS)}")
    args = parse_arguments(parser, seeds="0,1,2")
    arms = {name: ARMS[name] for name in choose(parser, "arm", args.arms, ARMS)}

    def command() -> None:
        laboratory = prepare(args, arms.values())
        console.rule("runs")
        results = run_all(arms, args.seeds, laboratory, args.workers)
        notes = {}
        if "teacher" in laboratory.scenes:
            file = laboratory.scenes["teacher"] / "mask_quality.json"
            notes["masks of the teacher"] = json.loads(file.read_text(encoding="utf-8"))
        report = args.output_dir / "report"
        tables = write_report(results, report, title="Evidence", claims=check_claims(results), notes=notes)
        console.print(tables)
        console.print(f"[green]Saved[/green] {report}: report.md, its figures, and results.json.")

    run_command(parser, command)


if __name__ == "__main__":
    main()
