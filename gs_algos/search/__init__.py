"""Chooses settings layer by layer under a budget; the answer is a list of rules.

How the parts fit, from what is asked to the answer:

- `space`: a `Knob` for each acting row of an algorithm's plan: the scheme of a weight or of inputs, the prune rate of a
  group. `kinds` has what each kind of knob is; a new kind is an entry there.
- `budget`, `cost`: what a network may take, and what a policy makes of it: bytes, parameters, multiply-adds, ms.
- `problem`: knobs, limits and scores together; what an agent is given. `repair` makes any picks fit.
- `agent`: proposes picks. A new agent is one file and one line in `agent.AGENTS`.
- `evaluate`, `journal`, `driver`: measure what agents propose, keep every result in a file, and count.
- `search` ties them; `stage.Search` is that as an algorithm, in pipelines and recipes.
"""
