"""Jobs of cauc-dist on SLURM, from a checkout: `python -m launch submit|status|logs|cancel|resume|sweep|ingest`.

Nothing in cauc_dist imports it, it is never installed, and nothing that a job unpickles lives here.
"""
