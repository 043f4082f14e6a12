"""What ``fst compare``, ``ablate``, ``plasticity`` and ``continual`` run: makers of jobs."""
