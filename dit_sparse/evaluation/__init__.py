"""Quality against speed: many ways to run attention, on one model, from the same noise.

`spec` says what to run, `runner` runs it and `store` keeps it, `metrics` compares clips with the
dense ones, `probe` looks at single attention calls, `summary` puts figures beside each other and
`report` makes a page of them.
"""
