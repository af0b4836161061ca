"""`bench`: what this machine reaches, as ratios of two things measured side by side."""
