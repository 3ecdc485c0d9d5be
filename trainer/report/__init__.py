"""What a run tells before it starts and after it ends: forecasts, plots, report pages, recipes."""
