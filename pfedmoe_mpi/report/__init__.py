"""Reports: what a run folder tells, as numbers, tables, figures and one HTML page.

`load` reads a run, `costs` and `compare` compute, `labels` names what is compared, `single` and `several`
choose what is shown, `gates`, `ranks` and `inside` are sections of one run, `tables`, `drawing`, `page` and
`terminal` show it. Nothing here needs torch or MPI but `models`, which looks into the models of a run and
gives plain arrays, `looked`.
"""
