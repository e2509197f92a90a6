"""Coverage: every transformer class of the installed diffusers, built small, found by watching, checked, and held to the truth.

`python -m dit_lens.coverage --out docs` makes the page. `rows.row(name)` is one class, `truth` what is known of it beforehand,
`page` the table.
"""
