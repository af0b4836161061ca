"""Reports: the contents of a run folder as numbers, tables, figures and one HTML page.

`load` reads a run; `costs` and `compare` compute; `labels` names methods and settings. `run_report` and
`comparison_report` choose what to show of one run and of several; `paper_section`, `drift_section`,
`epsilon_section`, `gate_section`, `rank_section` and `model_section` are parts of them. `tables`, `drawing`,
`page` and `terminal` render the `document`. Only `probe` needs torch and MPI: it evaluates the models of a
run and returns plain arrays, the `model_views`.
"""
