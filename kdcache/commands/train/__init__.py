"""`kdcache train`: a student from cached targets, on top of the HF Trainer and Ray Train."""
