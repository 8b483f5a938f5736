"""How noise becomes video. A schedule is a generator of finished latent blocks."""
