"""The search: Optuna proposes, Ray Tune runs.

samplers.py        Optuna samplers by name
tune_search.py     TuneSearch: the OptunaSearch that Ray Tune drives; it feeds the study and teaches the sampler
address.py         whether anything answers at an address
authentication.py  Ray's authentication, set before Ray is imported
step_parts.py      what the posterior takes of a predicted step: shares of its parts, and what they have in common
cluster.py         connects to Ray and compares its hardware with what the study asks for
runner.py          runs a study on Ray Tune
"""
