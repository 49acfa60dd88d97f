"""The figures of each part as a table."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def of(name: str, found: dict[str, Any]) -> Table | str:
    """The table of one part among all results so far."""
    part = found["parts"][name]
    figures = part["figures"]
    if isinstance(figures, dict) and "failed" in figures:
        return f"{name}: {figures['failed']}"
    title = f"{name}, measured in {part['took_s']:.0f} s"
    kind = name.split()[0]
    if kind in ("policy", "critic"):
        return update(title, figures, found["datasheet_flops_per_s"])
    return {
        "matrix": matrix,
        "recursion": recursion,
        "attention": attention,
        "logprobs": logprobs,
        "precision": precision,
        "deepspeed": deepspeed,
    }[kind](title, figures)


def rows(title: str, head: list[str], cells: list[list[str]]) -> Table:
    table = Table(title=title)
    for i, column in enumerate(head):
        table.add_column(column, justify="right" if i else "left")
    for row in cells:
        table.add_row(*row)
    return table


def matrix(title: str, flops: float) -> Table:
    return rows(title, ["", "TFLOP/s"], [["product of bfloat16 matrices", f"{flops / 1e12:,.0f}"]])


def recursion(title: str, figures: list[dict[str, Any]]) -> Table:
    names = list(figures[0]["s"])
    cells = [
        [one["shape"], f"{one['tokens']:,}"]
        + [f"{1e3 * one['s'][n]:,.2f} ms {one['s'][n] / one['s']['sae_rl']:,.1f}x" for n in names]
        for one in figures
    ]
    return rows(title, ["responses x longest", "tokens", *names], cells)


def attention(title: str, figures: list[dict[str, Any]]) -> Table:
    head = ["mix", "sequences"]
    cells = [[one["mix"], str(len(one["lengths"]))] for one in figures]
    for name in figures[0]["s"]:
        head += [f"{name}, first", "then", "TFLOP/s"]
        for row, one in zip(cells, figures, strict=True):
            row += [f"{1e3 * one['first_s'][name]:,.1f} ms", f"{1e3 * one['s'][name]:,.2f} ms"]
            row += [f"{one['flops_per_s'][name] / 1e12:,.0f}"]
    return rows(title, head, cells)


def logprobs(title: str, figures: list[dict[str, Any]]) -> Table:
    cells = [
        [one["way"], f"{one['tokens']:,}"]
        + (["out of memory", ""] if "s" not in one else [f"{1e3 * one['s']:,.1f} ms", f"{one['above_before_gib']:.2f}"])
        for one in figures
    ]
    return rows(title, ["", "tokens", "time", "GiB above weights and states"], cells)


def update(title: str, figures: dict[str, Any], datasheet: float | None) -> Table:
    head = ["phase", "s", "tokens/s", "TFLOP/s", "MFU", "peak GiB"]
    cells = []
    for phase, one in {**figures["phases"], "whole update": figures["update"]}.items():
        mfu = "" if datasheet is None else f"{100 * one['flops_per_s'] / datasheet:.1f} %"
        peak = f"{one['peak_gib']:.1f}" if "peak_gib" in one else ""
        rates = [f"{one['tokens_per_s']:,.0f}", f"{one['flops_per_s'] / 1e12:,.1f}"]
        cells.append([phase, f"{one['s']:.2f}", *rates, mfu, peak])
    size = f"{figures['layers']} of {figures['of_layers']} layers, {figures['parameters'] / 1e9:.2f}e9 parameters"
    return rows(f"{title}; {size}, {figures['tokens']:,} tokens", head, cells)


def precision(title: str, figures: dict[str, Any]) -> Table:
    names = ["mean", "p99", "largest", "bias", "relative_error_of_a_first_gradient"]
    head = ["mean |difference| of logprobs, nats", *names[1:]]
    size = f"{figures['layers']} layers of {figures['model']}, {figures['tokens']:,} tokens"
    return rows(f"{title}; {size}", head, [[f"{figures[name]:.2e}" for name in names]])


def deepspeed(title: str, figures: dict[str, Any]) -> Table:
    size = f"{figures['layers']} of {figures['of_layers']} layers, ZeRO {figures['zero_stage']}"
    rates = [f"{figures['tokens_per_s']:,.0f}", f"{figures['flops_per_s'] / 1e12:,.1f}"]
    cells = [f"{figures['role']} {figures['model']}", f"{figures['s']:.2f}", *rates, f"{figures['peak_gib']:.1f}"]
    return rows(f"{title}; {size}", ["update", "s", "tokens/s", "TFLOP/s", "peak GiB"], [cells])
