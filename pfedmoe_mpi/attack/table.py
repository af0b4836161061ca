"""The result of an attack as lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOST_ROWS = 40  # clients in a table
FALSE_POSITIVES = {"0.001": "0.1 %", "0.01": "1 %"}


def text(result: Mapping[str, Any]) -> str:
    """Return the result of an attack as lines of text."""
    lines = [f"{result['kind']} attack on {result['method']} after round {result['round']}"]
    return "\n".join([*lines, *(_membership if result["kind"] == "membership" else _reconstruction)(result)])


def _membership(result: Mapping[str, Any]) -> list[str]:
    found = result["clients"]
    lines = []
    rows = found["by_client"]
    for row in rows[:MOST_ROWS]:
        lines.append(f"client {row['client']:4}  {_rates(row)}")
    if len(rows) > MOST_ROWS:
        lines.append(f"… {len(rows) - MOST_ROWS} more clients; --json true prints all")
    lines += ["", "clients' models, all clients together", *_details(found["pooled"])]
    lines += _ratio(found)
    shared = result["shared"]
    if "reason" in shared:
        return [*lines, "", f"shared part: not attacked, {shared['reason']}"]
    lines += ["", f"shared part {shared['part']}, head: {shared['head']}", *_details(shared)]
    return [*lines, *_ratio(shared)]


def _ratio(found: Mapping[str, Any]) -> list[str]:
    """Return the likelihood ratio beside an attack by loss, if there is one."""
    ratio = found.get("likelihood_ratio")
    if not ratio:
        return []
    if "reason" in ratio:
        return ["", f"by likelihood ratio: not attacked, {ratio['reason']}"]
    return ["", f"by likelihood ratio with {ratio['shadows']} shadow runs", *_details(ratio)]


def _rates(row: Mapping[str, Any]) -> str:
    return (
        f"AUC {row['auc']:.3f}  balanced accuracy {row['balanced_accuracy']:.3f}  "
        f"{row['members']} members, {row['others']} others"
    )


def _details(row: Mapping[str, Any]) -> list[str]:
    """Return the rates with their intervals."""
    low_high = row["auc_interval"]
    lines = [f"  {_rates(row)}"]
    if low_high:
        lines.append(f"  AUC, 95 % interval {low_high[0]:.3f} to {low_high[1]:.3f}")
    for rate, name in FALSE_POSITIVES.items():
        at = row["tpr"][rate]
        if at is None:
            least = round(1 / float(rate))
            lines.append(
                f"  found at {name} false positives: needs {least} others, {row['others']} are there"
            )
        else:
            low, high = (100 * end for end in at["interval"])
            lines.append(
                f"  found at {name} false positives: {100 * at['rate']:.1f} % of the members "
                f"(95 % interval {low:.1f} to {high:.1f})"
            )
    return lines


def _reconstruction(result: Mapping[str, Any]) -> list[str]:
    lines = [
        f"client {result['client']}, {result['part']}: {result['trials']} contributions of one step with "
        f"{result['samples']} sample(s); protection: {result['protection']}",
        f"{'':24}{'MSE':>9}{'PSNR, dB':>10}{'SSIM':>8}",
    ]
    names = {"attack": "reconstruction", "mean": "mean of test rows", "guess": "drawn test rows"}
    for key, name in names.items():
        row = result[key]
        ssim = "-" if row["ssim"] is None else f"{row['ssim']:.3f}"
        lines.append(f"{name:24}{row['mse']:9.5f}{row['psnr']:10.1f}{ssim:>8}")
    return [*lines, f"1 - cosine of the gradients: {result['distance']:.4f}"]
