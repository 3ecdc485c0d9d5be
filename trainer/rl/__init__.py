"""What the reinforcement-learning trainers share: rollouts, rewards, the reference model."""
