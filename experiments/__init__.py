"""The experiments: one file each, reading like its protocol.

An experiment file holds a frozen dataclass of settings, one instance of it per preset, the measurement of one unit of work, and
`run`, which lists the units and returns what was measured. What is drawn of it stands in `figures`. The command line finds the
experiments through the entry-point group ``dit_lens.experiments``.
"""
