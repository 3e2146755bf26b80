"""Tables, figures and pages made from what was measured."""
