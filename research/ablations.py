# SPDX-License-Identifier: Apache-2.0
"""The ablations: what each part of the training contributes. Topics and variants are in `ablations.yaml`.

    python -m research.ablations --topics loss,gate

The variants are compared with the arms `guided` and `unguided` of the evidence, whose runs are used where they are there already.
Stop it, even kill it: the same command resumes.
"""

import argparse

from research.parts import choose, console, parse_arguments, prepare, run_command
from research.report import write_report
from research.runs import ARMS, FOLDER, read_variants, run_all

TOPICS = read_variants(FOLDER / "ablations.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m research.ablations", description="Train and examine variants of the recipe."
    )
    parser.add_argument("--topics", help=f"separated by commas; by default {','.join(TOPICS)}")
    args = parse_arguments(parser, seeds="0")
    topics = {name: TOPICS[name] for name in choose(parser, "topic", args.topics, TOPICS)}
    variants = {name: ARMS[name] for name in ("guided", "unguided")}
    for chosen in topics.values():
        variants |= chosen

    def command() -> None:
        laboratory = prepare(args, variants.values())
        console.rule("runs")
        results = run_all(variants, args.seeds, laboratory, args.workers)
        report = args.output_dir / "ablations"
        shown = {topic: ["unguided", *chosen] for topic, chosen in topics.items()}
        tables = write_report(results, report, title="Ablations", topics=shown, reference="guided")
        console.print(tables)
        console.print(f"[green]Saved[/green] {report}: report.md, its figures, and results.json.")

    run_command(parser, command)


if __name__ == "__main__":
    main()
