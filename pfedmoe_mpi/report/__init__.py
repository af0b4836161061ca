"""Reports: what a run folder tells, as numbers, tables, figures and one HTML page.

`load` reads a run, `costs` and `compare` compute, `single` and `several` choose what is shown, `tables`,
`drawing`, `page` and `terminal` show it. Nothing here needs torch or MPI.
"""
