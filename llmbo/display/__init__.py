"""What a person sees while a run goes on, in its own terminal or in another one."""
