"""Judges that know the drawn world's truth, the scores of generated clips, and the ablation's claims."""
