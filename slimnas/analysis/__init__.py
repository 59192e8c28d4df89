"""What a network's parts cost and hold: attention mechanisms, memory, similarity of heads."""
