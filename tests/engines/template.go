// Renders templates as ollama does, and finds in them what its parsers look for: the tag before a
// call (the first text within the first `if` on .ToolCalls) and the tags around a thought (the first
// and the last text of the block with the last .Thinking). Cases as JSON from standard input.
package main

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"text/template"
	"text/template/parse"
)

type Object map[string]any

func (o Object) String() string { b, _ := json.Marshal(map[string]any(o)); return string(b) }

type Function struct {
	Name      string
	Arguments Object
}
type Call struct{ Function Function }
type Message struct {
	Role, Content, Thinking string
	ToolCalls               []Call
}
type Case struct {
	Template, System string
	Tools            []Object
	Messages         []Message
	Think            bool
}
type Result struct{ Text, Call, Open, Close string }

// Every node, with the list that it stands in; branches in their order, a condition first.
func walk(list *parse.ListNode, visit func(node parse.Node, list *parse.ListNode)) {
	if list == nil {
		return
	}
	for _, node := range list.Nodes {
		visit(node, list)
		if branch := branchOf(node); branch != nil {
			walk(branch.List, visit)
			walk(branch.ElseList, visit)
		}
	}
}

func branchOf(node parse.Node) *parse.BranchNode {
	switch each := node.(type) {
	case *parse.IfNode:
		return &each.BranchNode
	case *parse.RangeNode:
		return &each.BranchNode
	case *parse.WithNode:
		return &each.BranchNode
	}
	return nil
}

// Whether a pipeline has the field, in brackets too if it is deep.
func has(pipe *parse.PipeNode, field string, deep bool) bool {
	for _, command := range pipe.Cmds {
		for _, arg := range command.Args {
			if found, ok := arg.(*parse.FieldNode); ok && found.Ident[0] == field {
				return true
			}
			if inner, ok := arg.(*parse.PipeNode); ok && deep && has(inner, field, true) {
				return true
			}
		}
	}
	return false
}

// The first text that is no white space; any other node before it hides it.
func firstText(list *parse.ListNode) string {
	for _, node := range list.Nodes {
		if text, ok := node.(*parse.TextNode); ok {
			if strings.TrimSpace(string(text.Text)) == "" {
				continue
			}
			return string(text.Text)
		}
		if branch := branchOf(node); branch != nil {
			if text := firstText(branch.List); text != "" {
				return text
			}
		}
		return ""
	}
	return ""
}

func tags(tree *parse.Tree) (call, open, close string) {
	found := false
	walk(tree.Root, func(node parse.Node, list *parse.ListNode) {
		if each, ok := node.(*parse.IfNode); ok && !found && has(each.Pipe, "ToolCalls", false) {
			found = true
			call, _, _ = strings.Cut(firstText(each.List), "{")
			call = strings.TrimSpace(call)
		}
		thinks := false
		if branch := branchOf(node); branch != nil {
			thinks = has(branch.Pipe, "Thinking", true)
		} else if action, ok := node.(*parse.ActionNode); ok {
			thinks = has(action.Pipe, "Thinking", true)
		}
		if thinks {
			if text, ok := list.Nodes[0].(*parse.TextNode); ok {
				open = strings.TrimSpace(string(text.Text))
			}
			if text, ok := list.Nodes[len(list.Nodes)-1].(*parse.TextNode); ok {
				close = strings.TrimSpace(string(text.Text))
			}
		}
	})
	return
}

func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	results := []Result{}
	for _, each := range cases {
		parsed := template.Must(template.New("").Option("missingkey=zero").Parse(each.Template))
		var out bytes.Buffer
		if err := parsed.Execute(&out, each); err != nil {
			panic(err)
		}
		call, open, close := tags(parsed.Tree)
		results = append(results, Result{out.String(), call, open, close})
	}
	json.NewEncoder(os.Stdout).Encode(results)
}
