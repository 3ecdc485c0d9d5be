"""Everything that runs a trained model: loading, engine, sampling, grammars, the microscope."""
